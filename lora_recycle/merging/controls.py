"""What a method must beat to have learned anything: random adapters, and heads that belong to other adapters."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch

from ..adapters.adapter import Adapter
from ..backbones.backbone import Backbone
from ..errors import AdapterError
from ..pool.pool import AdapterPool
from .base import MergingMethod


@dataclasses.dataclass
class RandomAverage(MergingMethod):
    """The average of random LoRAs of the same norms (`AdapterPool.randomized`): gains from any change at all."""

    seed: int = 0

    def networks(self, pool: AdapterPool) -> Iterator[AbstractContextManager[Backbone]]:
        yield pool.randomized(self.seed).folded()


def shuffled_heads(pool: AdapterPool, seed: int = 0) -> AdapterPool:
    """A control for recycling: every head moves to another adapter, with its class names.

    Averages and merges ignore heads, so this pool gives the same ones. What is inverted from it
    (`LoRAInverter(shuffled_heads(pool))`) is what heads say of features they were not tuned on; if that recycles as
    well as the real pool, nothing is owed to what the adapters know of their classes. Adapters without a head stay
    out. The hashes change, so that no surrogate data of the real pool is taken for this one's.

    Raises:
        AdapterError: fewer than two adapters have a head.
    """
    owners = [adapter for adapter in pool if not adapter.headless]
    if len(owners) < 2:
        raise AdapterError(f"shuffling needs at least 2 adapters with a head, this pool has {len(owners)}.")
    order = torch.randperm(len(owners), generator=torch.Generator().manual_seed(seed)).tolist()
    # one cycle through all of them: no adapter keeps its own
    donors = dict(zip(order, order[1:] + order[:1], strict=True))
    return AdapterPool(pool.backbone, [_with_head(owners[i], owners[donors[i]]) for i in range(len(owners))])


def _with_head(adapter: Adapter, donor: Adapter) -> Adapter:
    digest = hashlib.sha256(f"{adapter.info.sha256}/{donor.info.sha256}".encode()).hexdigest()
    info = dataclasses.replace(
        adapter.info, sha256=digest, num_classes=donor.info.num_classes, labels=donor.info.labels
    )
    return dataclasses.replace(adapter, info=info, head=donor.head)
