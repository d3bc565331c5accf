"""LoRAHub: one weight for each adapter, found without gradients (arXiv 2307.13269)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..errors import ConfigError
from ..fewshot.prototypes import class_prototypes
from ..pool.pool import AdapterPool
from .base import TaskNetwork, TaskTuning, leave_one_out_logits
from .config import TaskTuningConfig
from .mixture import AdapterMixture


BOUND = 1.5  # of the weights, as in the paper
PENALTY = 0.05  # of their mean absolute value, as in the paper
FIRST_SPREAD = 0.3
GROWTH = 1.5


class LoRAHub(TaskTuning):
    """Weights of up to `candidates` adapters of the pool that classify the support set best, searched from zero.

    A query is scored by prototypes under the weights found. The search sees the support images classified by the
    prototypes of the others of their class (by all, where a class has one image). Instead of a library's optimiser it
    is a (1+1) evolution strategy whose spread follows the one-fifth rule (Rechenberg 1973; the factors of Kern et al.,
    Natural Computing 3, 2004). The weights multiply changes; the paper's multiply the factors A and B apart, which is
    another thing and asks for equal ranks. `config.steps` counts evaluations; `lr` and `consistency` have no meaning.

    Args:
        candidates (`int`, *optional*, defaults to 20): adapters drawn from the pool, as in the paper.
        rank (`int`, *optional*, defaults to 16): to which each adapter's change is cut.
    """

    defaults = {"steps": 40, "last_layers": None}

    def __init__(self, config: TaskTuningConfig | None = None, candidates: int = 20, rank: int = 16):
        super().__init__(config)
        if candidates < 1:
            raise ConfigError(f"candidates must be at least 1, got {candidates}.")
        self.candidates, self.rank = candidates, rank

    def network(self, pool: AdapterPool) -> AdapterMixture:
        generator = torch.Generator().manual_seed(self.config.seed)
        drawn = torch.randperm(len(pool), generator=generator)[: self.candidates].sort().values.tolist()
        weights = torch.zeros(len(drawn), device=pool.backbone.device)

        def shared(module: str) -> torch.Tensor:
            return weights.to(pool.backbone.dtype)

        return AdapterMixture(pool, drawn, shared, [weights], self.rank, self.config.last_layers)

    @torch.no_grad()
    def tune(self, network: TaskNetwork, tokens: torch.Tensor, labels: torch.Tensor, ways: int) -> torch.Tensor:
        network.reset()
        (weights,), labels = network.parameters, labels.to(network.backbone.device)

        def loss(candidate: torch.Tensor) -> float:
            weights.copy_(candidate)
            features = network.features(tokens)
            logits = leave_one_out_logits(features, labels, ways, self.config.metric, self.config.temperature)
            return float(F.cross_entropy(logits, labels) + PENALTY * candidate.abs().mean())

        weights.copy_(evolve(loss, weights.cpu(), self.config.steps, self.config.seed))
        return class_prototypes(network.features(tokens), labels, ways)


def evolve(loss: Callable[[torch.Tensor], float], start: torch.Tensor, steps: int, seed: int) -> torch.Tensor:
    """The best of `steps` points that a (1+1) evolution strategy tries for a function of (n,), within `BOUND`."""
    generator, spread = torch.Generator().manual_seed(seed), FIRST_SPREAD
    best, lowest = start.clone(), loss(start)
    for _ in range(steps - 1):
        step = spread * torch.randn(best.shape, generator=generator)
        candidate = (best + step).clamp(-BOUND, BOUND)
        value = loss(candidate)
        if value < lowest:
            best, lowest, spread = candidate, value, spread * GROWTH
        else:
            spread *= GROWTH**-0.25  # balanced where one of five succeeds
    return best
