"""Learned composition: how much of each adapter each layer takes is tuned (arXiv 2402.15414)."""

from __future__ import annotations

import torch

from ..pool.pool import AdapterPool
from .base import TaskTuning
from .config import TaskTuningConfig
from .mixture import AdapterMixture


class LearnedComposition(TaskTuning):
    """In every linear layer a softmax over the pool's adapters weighs their changes; that and the prototypes learn.

    Every task begins with equal weights, which is the exact average (of changes cut to `rank`).

    Args:
        rank (`int`, *optional*, defaults to 16): to which each adapter's change is cut.
    """

    defaults = {"lr": 0.1}

    def __init__(self, config: TaskTuningConfig | None = None, rank: int = 16):
        super().__init__(config)
        self.rank = rank

    def network(self, pool: AdapterPool) -> AdapterMixture:
        modules = sorted({module for adapter in pool for module in adapter.factors})
        logits = {module: torch.zeros(len(pool), device=pool.backbone.device) for module in modules}

        def weights(module: str) -> torch.Tensor:
            return logits[module].softmax(0).to(pool.backbone.dtype)

        # those of layers that do not learn get no gradient, and Adam passes over them
        return AdapterMixture(pool, range(len(pool)), weights, logits.values(), self.rank, self.config.last_layers)
