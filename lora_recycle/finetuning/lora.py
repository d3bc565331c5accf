"""A LoRA tuned on each task, from nothing or from the pool's average."""

from __future__ import annotations

import copy

from ..adapters.trainable import adapted_layers, adapter_config, linear_layers, start_lora, wrap_seeded
from ..pool.pool import AdapterPool
from .base import TaskNetwork, TaskTuning
from .config import TaskTuningConfig


class LoRATuning(TaskTuning):
    """A new LoRA on all linear layers and the prototypes ("LoRA + Linear" in LoRA Recycle's tables).

    Args:
        rank (`int`, *optional*, defaults to 8): of the LoRA.
    """

    start = "zero"

    def __init__(self, config: TaskTuningConfig | None = None, rank: int = 8):
        super().__init__(config)
        self.rank = rank

    def network(self, pool: AdapterPool) -> TaskNetwork:
        last, depth = self.config.last_layers, len(pool.backbone.layers)
        first = 0 if last is None else min(max(0, depth - last), depth - 1)
        backbone, seed = copy.deepcopy(pool.backbone), self.config.seed
        config = adapter_config("LORA", self.rank, linear_layers(backbone), backbone, seed)
        wrap_seeded(backbone.model, config, seed)
        backbone.layers[:first].requires_grad_(False)
        if self.start == "average":
            layers, rank = adapted_layers(backbone.model), getattr(config, "r", self.rank)
            for name, (b, a) in pool.whole_averages():
                start_lora(layers[name], b[:, :rank], a[:rank])
        return TaskNetwork(backbone, [p for p in backbone.parameters() if p.requires_grad], depth - first)


class AverageLoRA(LoRATuning):
    """The same from the pool's average, cut to the rank: PVP (arXiv 2304.13639) with the adapter that takes seconds.

    Args:
        rank (`int`, *optional*, defaults to 16): of the LoRA.
    """

    start = "average"

    def __init__(self, config: TaskTuningConfig | None = None, rank: int = 16):
        super().__init__(config, rank)
