"""What the tuning-free ways to use a pool share: networks that look at the images, and who of them is heard."""

from __future__ import annotations

import abc
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from ..adapters.adapter import Adapter
from ..adapters.weight_deltas import split_changes
from ..backbones.backbone import Backbone, extract_features
from ..errors import AdapterError, ConfigError, DataError
from ..fewshot.prototypes import class_prototypes, prototype_logits
from ..pool.pool import AdapterPool


#: A change of the backbone: parameter name to a tensor of the parameter's shape.
Changes = dict[str, torch.Tensor]
#: From a network's number to its features of one support set, (S, D). A network that is not asked costs nothing.
Look = Callable[[int], torch.Tensor]
#: From a look at a support set and its labels, int64 (S,), to the number of the network that the task takes.
Choice = Callable[[Look, torch.Tensor], int]


class MergingMethod(abc.ABC):
    """A way to use a pool on a new task without tuning: prototypes on what one or several networks see.

    A query's score for a class is its cosine similarity to the class's prototype, the mean over all networks.
    """

    @abc.abstractmethod
    def networks(self, pool: AdapterPool) -> Iterator[AbstractContextManager[Backbone]]:
        """The networks, to be entered and left one after another. They are the pool's own backbone with other weights.

        Raises:
            AdapterError: an adapter changes no weights (`Adapter.peft_layers`), and the method needs changes.
        """

    def classify(
        self,
        pool: AdapterPool,
        support: torch.Tensor,
        labels: torch.Tensor,
        queries: torch.Tensor,
        batch_size: int = 128,
    ) -> torch.Tensor:
        """Scores of one task's queries; for many tasks on the same images [`evaluate`] computes features once.

        Args:
            support (`torch.Tensor`): uint8 (S, 3, H, W).
            labels (`torch.Tensor`): int64 (S,), values 0 to C - 1, each present.
            queries (`torch.Tensor`): uint8 (Q, 3, H, W).
            batch_size (`int`, *optional*, defaults to 128): images that go through a network at once.

        Returns:
            `torch.Tensor`: (Q, C), the higher the likelier.

        Raises:
            DataError: labels that do not number 0 to C - 1, or another number of them than of images.
        """
        labels = _checked_labels(support, labels)
        scores = [_scores(network, support, labels, queries, batch_size) for network in self.networks(pool)]
        return torch.stack(scores).mean(0)


class Selection(MergingMethod):
    """Several networks, of which each task takes the one that its support set chooses."""

    @abc.abstractmethod
    def choice(self, pool: AdapterPool) -> Choice:
        """What chooses one of `networks(pool)`; made once for many tasks."""

    def classify(
        self,
        pool: AdapterPool,
        support: torch.Tensor,
        labels: torch.Tensor,
        queries: torch.Tensor,
        batch_size: int = 128,
    ) -> torch.Tensor:
        """As [`MergingMethod.classify`]; the support set goes through the networks asked, the queries through one."""
        labels = _checked_labels(support, labels)

        def network(number: int) -> AbstractContextManager[Backbone]:
            (wanted,) = itertools.islice(self.networks(pool), number, number + 1)
            return wanted

        @functools.cache
        def look(number: int) -> torch.Tensor:
            with network(number) as backbone:
                return extract_features(backbone, support, batch_size)

        chosen = self.choice(pool)(look, labels)
        return _scores(network(chosen), support, labels, queries, batch_size)


@dataclasses.dataclass
class Merge(MergingMethod):
    """One change of the backbone, made once for all tasks: a forward costs what the bare backbone costs.

    Args:
        scale (`float`, *optional*): the merged change is multiplied by it. By keyword only.

    Raises:
        ConfigError: a scale that is not positive and finite.
    """

    scale: float = dataclasses.field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        checked_scale(self.scale)

    @abc.abstractmethod
    def changes(self, pool: AdapterPool) -> Changes:
        """The merged change before it is scaled, dense, on the backbone's device. One adapter's own change is formed
        at a time."""

    def merge(self, pool: AdapterPool) -> Adapter:
        """The merged and scaled change as an adapter without a head: it can be folded, or cut to a rank as a pool of
        one."""
        blank: dict[str, Any] = dict.fromkeys(("revision", "rank", "alpha", "num_classes", "labels"))
        name = f"{type(self).__name__} of {len(pool)} adapters"
        info = dataclasses.replace(pool[0].info, name=name, path=Path(), sha256="", config={}, **blank)
        scaled = {name: change * self.scale for name, change in self.changes(pool).items()}
        return Adapter(info, *split_changes(scaled, pool.backbone))

    def networks(self, pool: AdapterPool) -> Iterator[AbstractContextManager[Backbone]]:
        yield pool.folded([self.merge(pool)])


def dense_changes(adapter: Adapter, device: torch.device) -> Changes:
    """All that an adapter changes, in float32.

    Raises:
        AdapterError: the adapter is no change of weights.
    """
    require_weight_changes(adapter)
    dense = {name: change.to(device).float() for name, change in adapter.vector_deltas.items()}
    for module, (b, a) in adapter.factors.items():
        dense[f"{module}.weight"] = b.to(device).float() @ a.to(device).float()
    return dense


def require_weight_changes(adapter: Adapter) -> None:
    """Raise `AdapterError` for an adapter that computes with its input instead of changing weights."""
    if adapter.peft_layers:
        raise AdapterError(
            f"{adapter.info.name}: adapters of type {adapter.info.peft_type} change no weights, so they cannot be "
            "merged or routed. Leave it out (pool.subset), or use the ensemble, which wears it as it is."
        )


def add_scaled(total: Changes, changes: Changes, scale: float) -> None:
    """Add `scale` times the changes to a running total."""
    for name, change in changes.items():
        if name in total:
            total[name].add_(change, alpha=scale)
        else:
            total[name] = change * scale


def checked_density(density: float) -> float:
    """The share of a change's entries that is kept. Raises `ConfigError` outside of (0, 1]."""
    if not 0 < density <= 1:
        raise ConfigError(f"density must be in (0, 1], got {density}: the share of each change's entries to keep.")
    return density


def checked_scale(scale: float) -> float:
    """What a merged change is multiplied by. Raises `ConfigError` where it is not positive and finite."""
    if not 0 < scale < math.inf:
        raise ConfigError(f"scale must be positive and finite, got {scale}: the merged change is multiplied by it.")
    return scale


def _checked_labels(support: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    classes = labels.unique().tolist()
    if len(labels) != len(support) or not classes or classes != list(range(len(classes))):
        raise DataError(
            f"the labels of {len(support)} support images must be as many and number the classes 0, 1, ..., "
            f"got {len(labels)} with the values {classes}."
        )
    return labels.cpu()


def _scores(
    network: AbstractContextManager[Backbone],
    support: torch.Tensor,
    labels: torch.Tensor,
    queries: torch.Tensor,
    batch_size: int,
) -> torch.Tensor:
    with network as backbone:
        shots, asked = (extract_features(backbone, images, batch_size) for images in (support, queries))
    return prototype_logits(asked, class_prototypes(shots, labels, int(labels.max()) + 1))
