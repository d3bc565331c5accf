"""Magnitude pruning: the mean of the changes, each cut to its largest entries first."""

from __future__ import annotations

import dataclasses

import torch

from ..pool.pool import AdapterPool
from .base import Changes, Merge, add_scaled, checked_density, dense_changes


@dataclasses.dataclass
class MagnitudePruning(Merge):
    """The trimming step of TIES alone, then the mean.

    PEFT's `add_weighted_adapter` with `magnitude_prune` prunes the factors A and B apart and sums them apart; here, as
    in the papers, the change `B A` itself is pruned. What PEFT does to one tensor (`peft.utils.merge_utils`) is the
    same but for the scope: it keeps the largest entries of each tensor, this those of the whole change.

    Args:
        density (`float`, *optional*, defaults to 0.2): share of each adapter's entries that is kept.

    Raises:
        ConfigError: a density outside of (0, 1].
    """

    density: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        checked_density(self.density)

    def changes(self, pool: AdapterPool) -> Changes:
        total: Changes = {}
        for i in range(len(pool)):
            add_scaled(total, keep_largest(dense_changes(pool[i], pool.backbone.device), self.density), 1 / len(pool))
        return total


def keep_largest(changes: Changes, density: float) -> Changes:
    """The `density` largest entries by magnitude of all changes together, the others zero.

    A density so small that it would keep none keeps one. Entries as large as the smallest one kept are kept too.
    """
    if not changes:
        return {}
    sizes = torch.cat([change.abs().flatten() for change in changes.values()])
    kept = max(1, int(density * len(sizes)))
    threshold = sizes.kthvalue(len(sizes) - kept + 1).values
    return {name: change.where(change.abs() >= threshold, 0) for name, change in changes.items()}
