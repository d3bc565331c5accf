"""Average merging: the exact mean of the adapters' weight changes (arXiv 2402.15414, without its tuned head)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager

from ..backbones.backbone import Backbone
from ..pool.pool import AdapterPool
from .base import MergingMethod, checked_scale
from .factors import worn_factors


@dataclasses.dataclass
class Average(MergingMethod):
    """The mean of all weight changes, ranks, targets and types mixed.

    It is the mean of the changes `B A`. PEFT's `add_weighted_adapter` with `linear` averages B and A apart, which is
    something else (and refused for mixed ranks). Its `cat`, and `svd` at the sum of the ranks, give the same as this,
    unless the first adapter is an rsLoRA: the result inherits that and is scaled by the root of its rank once more.

    Args:
        rank (`int`, *optional*): None folds the mean into the weights, at no cost for a forward. With a number the
            weights stay, and the best approximation of that rank (truncated SVD) acts as factors beside them. Changes
            of biases and norms have no factors and are left out then.
        scale (`float`, *optional*, defaults to 1.0): the mean is multiplied by it. With a scale found on validation
            classes this is task arithmetic (arXiv 2212.04089), whose sum of T changes times L is the mean times T L.

    Raises:
        ConfigError: a scale that is not positive and finite.
    """

    rank: int | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        checked_scale(self.scale)

    def networks(self, pool: AdapterPool) -> Iterator[AbstractContextManager[Backbone]]:
        if self.rank is None:
            yield pool.folded(scale=self.scale)
        else:
            average = {module: (b * self.scale, a) for module, (b, a) in pool.average(self.rank).items()}
            yield worn_factors(pool.backbone, average)
