"""Linear probes: the network stays as it is, prototypes on its features learn."""

from __future__ import annotations

import copy

from ..pool.pool import AdapterPool
from .base import TaskNetwork, TaskTuning


class LinearProbe(TaskTuning):
    """A cosine classifier on frozen features that starts at the prototypes and is tuned by gradients.

    The head `logistic_regression` is the same idea with scikit-learn's solver, its penalty, and no start.
    """

    defaults = {"last_layers": 0, "steps": 30}

    def network(self, pool: AdapterPool) -> TaskNetwork:
        return TaskNetwork(pool.backbone, last_layers=0)


class AverageLinear(LinearProbe):
    """The same on the pool's exact average ("LoRAs Avg + Linear" in LoRA Recycle's tables)."""

    def network(self, pool: AdapterPool) -> TaskNetwork:
        with pool.folded() as averaged:
            return TaskNetwork(copy.deepcopy(averaged), last_layers=0)
