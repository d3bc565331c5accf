"""TIES: trim, elect signs, merge what agrees with them (arXiv 2306.01708)."""

from __future__ import annotations

import dataclasses

import torch

from ..pool.pool import AdapterPool
from .base import Changes, Merge, checked_density, dense_changes
from .magnitude import keep_largest


@dataclasses.dataclass
class Ties(Merge):
    """Trim each change to its largest entries; elect each entry's sign by the sum of what is left; then the mean of
    the entries of the elected sign, multiplied by a scale.

    PEFT's `add_weighted_adapter` with `ties` does this to the factors A and B apart, where signs mean nothing:
    (-B)(-A) is the same change. What it does to one tensor (`peft.utils.merge_utils.ties`) is right, and here done to
    `B A`; it trims each tensor for itself, this, as the paper, the whole change.

    Args:
        density (`float`, *optional*, defaults to 0.2): share of each adapter's entries that survive the trimming.
        scale (`float`, *optional*, defaults to 0.3): the paper takes 1 where it has no validation data. With 40
            adapters an entry that one of them keeps counts in full, so that the change becomes too large. The default
            was chosen on validation classes (`examples/studies/choose_scale.py`).

    Raises:
        ConfigError: a density outside of (0, 1], or a scale that is not positive and finite.
    """

    density: float = 0.2
    scale: float = dataclasses.field(default=0.3, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        checked_density(self.density)

    def changes(self, pool: AdapterPool) -> Changes:
        votes = Votes()
        for i in range(len(pool)):
            votes.add(keep_largest(dense_changes(pool[i], pool.backbone.device), self.density))
        return votes.elected()


class Votes:
    """Sum and number of the positive and of the negative entries so far: all that the election needs in the end."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, torch.Tensor] = {}

    def add(self, changes: Changes) -> None:
        for name, change in changes.items():
            if name not in self.sums:
                self.sums[name] = change.new_zeros(2, *change.shape)
                self.counts[name] = torch.zeros_like(self.sums[name], dtype=torch.int16)
            for side, part in enumerate((change.clamp_min(0), change.clamp_max(0))):
                self.sums[name][side] += part
                self.counts[name][side] += part != 0

    def elected(self) -> Changes:
        """The mean of the entries of the larger side; a draw goes to the positive one, as in PEFT."""
        merged = {}
        for name, (positive, negative) in self.sums.items():
            counts = self.counts[name]
            up = positive + negative >= 0
            merged[name] = positive.where(up, negative) / counts[0].where(up, counts[1]).clamp_min(1)
        return merged
