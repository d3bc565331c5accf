"""LoRAHub: one weight for each adapter, found without gradients (arXiv 2307.13269)."""

from __future__ import annotations

import warnings
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


class LoRAHub(TaskTuning):
    """Weights of up to `candidates` adapters of the pool that classify the support set best, searched from zero.

    A query is scored by prototypes under the weights found. The search sees the support images classified by the
    prototypes of the others of their class (by all, where a class has one image). It is nevergrad's NGOpt, as in the
    paper's code, with the paper's start, bounds, penalty and number of evaluations. The weights multiply changes; the
    paper's multiply the factors A and B apart, which is another thing and asks for equal ranks. `config.steps` counts
    evaluations; `lr` and `consistency` have no meaning. (For 100 and more of them NGOpt may choose, with few adapters,
    an optimiser of nevergrad 1.0.12 that fails under numpy 2.4.)

    Args:
        candidates (`int`, *optional*, defaults to 20): adapters drawn from the pool, as in the paper. The others of a
            larger pool play no part.
        rank (`int`, *optional*, defaults to 16): to which each adapter's change is cut.

    Raises:
        ConfigError: fewer than one candidate; from `network`, nevergrad is not installed.
    """

    defaults = {"steps": 40, "last_layers": None}

    def __init__(self, config: TaskTuningConfig | None = None, candidates: int = 20, rank: int = 16):
        super().__init__(config)
        if candidates < 1:
            raise ConfigError(f"candidates must be at least 1, got {candidates}.")
        self.candidates, self.rank = candidates, rank

    def network(self, pool: AdapterPool) -> AdapterMixture:
        require_nevergrad()
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

        weights.copy_(search(loss, len(weights), self.config.steps, self.config.seed))
        return class_prototypes(network.features(tokens), labels, ways)


def require_nevergrad() -> None:
    """Raise `ConfigError` where the optimiser of the search is not installed."""
    try:
        import nevergrad  # noqa: F401 - an extra
    except ImportError as error:
        raise ConfigError("lorahub searches with nevergrad: pip install 'lora-recycle[lorahub]'.") from error


def search(loss: Callable[[torch.Tensor], float], size: int, steps: int, seed: int) -> torch.Tensor:
    """What NGOpt recommends after `steps` values of a function of (size,), from zero and within `BOUND`.

    With 0 steps it is the start.
    """
    import nevergrad
    import numpy as np

    if not steps:
        return torch.zeros(size)
    space = nevergrad.p.Array(init=np.zeros(size)).set_bounds(-BOUND, BOUND)
    space.random_state = np.random.RandomState(seed)
    optimizer = nevergrad.optimizers.NGOpt(parametrization=space, budget=steps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the optimisers that it chooses among, about their own settings
        found = optimizer.minimize(lambda weights: loss(torch.from_numpy(weights).float()))
    return torch.from_numpy(found.value).float()
