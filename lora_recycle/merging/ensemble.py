"""The ensemble: every adapter looks for itself, and the mean of their similarities decides."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager

from ..backbones.backbone import Backbone
from ..pool.pool import AdapterPool
from .base import MergingMethod


class Ensemble(MergingMethod):
    """One forward an adapter: the ceiling of what a pool knows, and as many times the cost."""

    def networks(self, pool: AdapterPool) -> Iterator[AbstractContextManager[Backbone]]:
        return (pool.folded(i) for i in range(len(pool)))
