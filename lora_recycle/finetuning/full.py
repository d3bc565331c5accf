"""Full tuning: all weights of the network learn."""

from __future__ import annotations

import copy

from ..pool.pool import AdapterPool
from .base import TaskNetwork, TaskTuning


class FullTuning(TaskTuning):
    """Every weight of the layers that learn, norms and biases among them, and the prototypes; no embeddings."""

    defaults = {"lr": 1e-5, "last_layers": None}

    def network(self, pool: AdapterPool) -> TaskNetwork:
        backbone, last = copy.deepcopy(pool.backbone), self.config.last_layers
        layers = backbone.layers if last is None else backbone.layers[max(0, len(backbone.layers) - last) :]
        norm = backbone.model.get_submodule(backbone.family.norm)
        return TaskNetwork(backbone, [*layers.parameters(), *norm.parameters()], last)
