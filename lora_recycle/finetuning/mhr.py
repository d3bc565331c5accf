"""Multi-head routing on a new task: tune the routing alone, or one LoRA from the average (arXiv 2211.03831)."""

from __future__ import annotations

import torch

from ..errors import ConfigError
from ..pool.pool import AdapterPool
from .base import TaskTuning
from .config import TaskTuningConfig
from .lora import AverageLoRA
from .mixture import AdapterMixture


class RoutingTuning(TaskTuning):
    """MHR-z: the adapters stay, and how much of each every block of outputs of a linear layer takes is tuned.

    As in Polytropon, of which MHR is the version with several heads, a weight is the sigmoid of a logit divided by the
    sum over the adapters. Every task begins with equal weights, which is the exact average (of changes cut to `rank`).
    The paper's adapters were trained together with their routing and share a rank, so it can mix A by blocks of inputs
    and B by blocks of outputs; adapters of strangers have no common basis inside, and their changes B A are mixed by
    blocks of outputs. With one head it is [`LearnedComposition`] with another normalisation.

    Args:
        heads (`int`, *optional*, defaults to 8): blocks of outputs of a layer, each with weights of its own.
        rank (`int`, *optional*, defaults to 16): to which each adapter's change is cut.

    Raises:
        ConfigError: fewer than one head.
    """

    defaults = {"lr": 0.1}

    def __init__(self, config: TaskTuningConfig | None = None, heads: int = 8, rank: int = 16):
        super().__init__(config)
        if heads < 1:
            raise ConfigError(f"heads must be at least 1, got {heads}.")
        self.heads, self.rank = heads, rank

    def network(self, pool: AdapterPool) -> AdapterMixture:
        modules = sorted({module for adapter in pool for module in adapter.factors})
        logits = {module: torch.zeros(self.heads, len(pool), device=pool.backbone.device) for module in modules}
        outputs = {module: len(pool.backbone.model.get_parameter(f"{module}.weight")) for module in modules}

        def weights(module: str) -> torch.Tensor:
            open_to = logits[module].sigmoid()
            shares = open_to / open_to.sum(-1, keepdim=True)  # (heads, adapters)
            head = torch.arange(outputs[module], device=shares.device) * self.heads // outputs[module]
            return shares[head].to(pool.backbone.dtype)

        return AdapterMixture(pool, range(len(pool)), weights, logits.values(), self.rank, self.config.last_layers)


class TunedAverage(AverageLoRA):
    """MHR-mu: no routing; one LoRA, in all layers, begins at the pool's average and learns.

    The paper averages factors of adapters that share a rank and were trained together; here it is the exact average of
    the changes, cut to `rank`. [`AverageLoRA`] is the same in the last two layers alone.
    """

    defaults = {"last_layers": None}
