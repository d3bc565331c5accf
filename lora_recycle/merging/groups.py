"""Averages of adapters that belong together by their weights (`AdapterPool.groups`): their sum, the nearest one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch

from ..backbones.backbone import Backbone
from ..fewshot.domains import separability
from ..pool.pool import AdapterPool
from .base import Changes, Choice, Merge, Selection, add_scaled, dense_changes


class Undiluted(Merge):
    """The exact average, scaled so that the largest group of adapters acts at its full strength.

    In a pool of several domains the average multiplies each domain's own mean change by its share of the pool. Undone
    for the largest, the others rise in proportion, and disturb it less than in `GroupSum`, where all are at full
    strength. With one group it is the average.
    """

    def changes(self, pool: AdapterPool) -> Changes:
        largest = max(map(len, pool.groups()))
        return _weighted(pool, lambda size: 1 / largest)


class Restored(Merge):
    """The exact average, in which the largest group of adapters has its full strength again and the others stay.

    The largest group (or those as large) gains what averaging took from it, and the others disturb it as little as in
    the average. With one group it is the average.
    """

    def changes(self, pool: AdapterPool) -> Changes:
        largest = max(map(len, pool.groups()))
        return _weighted(pool, lambda size: 1 / size if size == largest else 1 / len(pool))


class GroupSum(Merge):
    """The sum of the groups' averages: in a pool of several domains, each domain's change at its full strength.

    With one group it is the average. The more groups there are, the larger the change, and the more they disturb each
    other.
    """

    def changes(self, pool: AdapterPool) -> Changes:
        return _weighted(pool, lambda size: 1 / size)


def _weighted(pool: AdapterPool, weight: Callable[[int], float]) -> Changes:
    """The sum of all changes, each times the `weight` that an adapter has in a group of that size."""
    total: Changes = {}
    for group in pool.groups():
        for i in group:
            add_scaled(total, dense_changes(pool[i], pool.backbone.device), weight(len(group)))
    return total


class NearestGroup(Selection):
    """For each task the average of the one group of adapters that sets its support classes apart best.

    A support image goes through the average of every group, a query only through the one chosen. Near means
    `separability`, which asks nothing of the adapters' heads and exists for one shot too.
    """

    def networks(self, pool: AdapterPool) -> Iterator[AbstractContextManager[Backbone]]:
        return (pool.subset(group).folded() for group in pool.groups())

    def choice(self, pool: AdapterPool) -> Choice:
        groups = len(pool.groups())
        return lambda look, labels: int(torch.stack([separability(look(g), labels) for g in range(groups)]).argmax())
