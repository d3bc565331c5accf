"""Class-statistics matching: the adapter whose own classes a support set looks like (MOS, arXiv 2412.09441)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F

from ..adapters.adapter import Adapter
from ..adapters.heads import PooledHead, TextHead
from ..backbones.backbone import Backbone
from ..errors import AdapterError
from ..pool.pool import AdapterPool
from .base import Choice, Selection


@dataclasses.dataclass
class ClassStatistics(Selection):
    """For each task the one adapter whose classes its support images match best, refined until the choice stands.

    The self-refined retrieval of MOS (Sun et al., AAAI 2025): features by the bare backbone are matched with the class
    statistics of all adapters, and the adapter that has the best match sees the images next. What it sees is matched
    with all of them again, until an adapter chooses itself. Where the choice goes round in a circle instead (MOS stops
    after four rounds), the one in it that matches itself best is taken. Nothing is learned.

    Adapters bring no images, which forces three differences:

    - MOS keeps the mean features of each class, and a classifier of all classes aligned on draws from them. Here the
      statistics are the rows of the adapters' heads (`class_directions`), compared by cosine, since heads that were
      tuned apart differ in scale.
    - A head's rows say how its classes differ, not where they lie, so the features are taken less their mean too.
    - The classes of a task belong to no adapter. The whole support set chooses, by the mean over its images of their
      best similarity to a class, and its queries follow; in MOS each query chooses for itself.

    A task costs the support set's forwards through the backbone and through each adapter that was chosen on the way,
    as many as there are adapters at most and usually one or two; queries go through one network.
    """

    def networks(self, pool: AdapterPool) -> Iterator[AbstractContextManager[Backbone]]:
        """The bare backbone, for the first look, then every adapter."""
        yield nullcontext(pool.backbone)
        for i in range(len(pool)):
            yield pool.folded(i)

    def choice(self, pool: AdapterPool) -> Choice:
        """What chooses an adapter, never the bare backbone.

        Raises:
            AdapterError: an adapter has no head, or one that reads something else than the feature.
        """
        directions = [class_directions(adapter, pool.backbone).cpu() for adapter in pool]

        def matches(features: torch.Tensor) -> torch.Tensor:
            return torch.stack([match(features, own) for own in directions])

        def choose(look: Callable[[int], torch.Tensor], labels: torch.Tensor) -> int:
            chosen, asked = int(matches(look(0)).argmax()), {}
            while chosen not in asked:
                asked[chosen] = matches(look(1 + chosen))
                chosen, last = int(asked[chosen].argmax()), chosen
            if chosen == last:
                return 1 + chosen
            circle = list(asked)[list(asked).index(chosen) :]
            return 1 + max(circle, key=lambda adapter: float(asked[adapter][adapter]))

        return choose


def match(features: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """How well images fit the classes of one adapter: the mean of each image's highest cosine to a class direction.

    Args:
        features (`torch.Tensor`): (S, D), of which the mean is subtracted.
        directions (`torch.Tensor`): (C, D), as of [`class_directions`].

    Returns:
        `torch.Tensor`: a scalar in [-1, 1].
    """
    return (F.normalize(features - features.mean(0), dim=-1) @ directions.T).amax(1).mean()


def class_directions(adapter: Adapter, backbone: Backbone) -> torch.Tensor:
    """The rows of an adapter's head less their mean, of unit length: (C, D), in the space of the backbone's features.

    Scores are compared within a head, so what all its rows share means nothing. Of a head on the CLS token and the
    mean patch side by side (DINOv2) the part on the CLS token is taken.

    Raises:
        AdapterError: there is no head, or it reads the mean patch, which is not the feature.
    """
    head, advice = adapter.head, "Leave it out (pool.subset), or use nearest-group, which asks no heads."
    if head is None:
        raise AdapterError(f"{adapter.info.name}: has no classification head, so its classes are not known. {advice}")
    rows = head.weight.float()
    if isinstance(head, TextHead) and head.projection is not None:
        rows = rows @ head.projection.float()
    elif not isinstance(head, PooledHead) and backbone.family.head_input == "patches":
        raise AdapterError(f"{adapter.info.name}: its head reads the mean patch, not the image's feature. {advice}")
    rows = rows[:, : backbone.hidden_size]
    return F.normalize(rows - rows.mean(0), dim=-1)
