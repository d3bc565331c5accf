"""DARE: drop entries of each change at random, rescale the rest, average (arXiv 2311.03099)."""

from __future__ import annotations

import dataclasses

import torch

from ..pool.pool import AdapterPool
from .base import Changes, Merge, add_scaled, checked_density, dense_changes


@dataclasses.dataclass
class Dare(Merge):
    """Each entry of each change survives with probability `density` and is divided by it; then the mean.

    PEFT's `dare_linear` does this to the factors A and B apart, whose product is then no rescaled change; what it does
    to one tensor is what is done here to the change `B A`.

    Args:
        density (`float`, *optional*, defaults to 0.2): share of entries that survive, 1 - the paper's drop rate p.
        seed (`int`, *optional*, defaults to 0): of what is dropped.

    Raises:
        ConfigError: a density outside of (0, 1].
    """

    density: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        checked_density(self.density)

    def changes(self, pool: AdapterPool) -> Changes:
        generator = torch.Generator().manual_seed(self.seed)
        total: Changes = {}
        for i in range(len(pool)):
            changes = dense_changes(pool[i], pool.backbone.device)
            for name in sorted(changes):
                # drawn on the CPU, so that every device drops the same
                survives = torch.rand(changes[name].shape, generator=generator) < self.density
                changes[name] *= survives.to(changes[name].device)
            add_scaled(total, changes, 1 / (self.density * len(pool)))
        return total
