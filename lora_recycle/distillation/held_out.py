"""Adapters that teach nothing, and few-shot episodes on their surrogate images.

By agreement with teachers, and on images of adapters that taught, a student improves with every step while its
accuracy on real images falls. On classes of adapters that it never met it is worse where it is on real images, if it
learns by similarities; one that learns by episodes learns this figure too (examples/studies/choose_without_images.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import torch

from ..errors import DataError
from ..fewshot.accuracy import prototype_accuracy
from ..fewshot.episodes import EpisodeSet, sample_episodes
from ..runtime.heartbeat import beat
from ..surrogate.dataset import evenly_spread
from .surrogate_images import SurrogateImages


if TYPE_CHECKING:
    from .batches import BatchMaker


#: A smaller group of like adapters teaches as a whole.
SMALLEST_GROUP = 4
#: Adapters that students are evaluated on, at most; classes of each, images of each class, and episodes on them.
MOST_ADAPTERS, _CLASSES, _IMAGES, _EPISODES = 16, 10, 6, 60
_WAYS, _SHOTS = 5, 1
#: Images that are forwarded at a time.
_BATCH = 128


def hold_out(groups: list[list[int]], images: SurrogateImages, share: float) -> list[int]:
    """Adapters that are to teach nothing: `share` of each group of `SMALLEST_GROUP` or more, spread evenly over it.

    At least one of a group, at most `MOST_ADAPTERS` in all, none whose images make no episode; none of smaller groups.
    """
    large = [group for group in groups if share and len(group) >= SMALLEST_GROUP]
    held_out: list[int] = []
    for group in large:
        usable = [i for i in group if len(_classes(images.shards[i].labels)) > 1]
        most = min(max(1, round(share * len(group))), max(1, MOST_ADAPTERS // len(large)))
        held_out += [usable[i] for i in evenly_spread(len(usable), most).tolist()]
    return sorted(held_out)


#: From this process's share of a batch, as `Batch` has it, and how many images the batch has, to features (B, D).
Embed: TypeAlias = Callable[[torch.Tensor, torch.Tensor | None, int], torch.Tensor]


class HeldOutEpisodes:
    """Few-shot episodes on the surrogate images of held-out adapters, which are read from disk each time.

    Always the same episodes in the same batches: equal weights make equal errors, whenever and, but for rounding, on
    however many processes.

    Args:
        held_out: numbers of adapters, from [`hold_out`].
        make_batch: reads this process's share of images.
        metric: of the prototypes, as `prototype_accuracy` has it.
    """

    def __init__(self, held_out: list[int], make_batch: BatchMaker, metric: str, seed: int):
        self._make_batch, self._metric = make_batch, metric
        self._images: list[torch.Tensor] = []
        self._episodes: list[EpisodeSet] = []
        for adapter in held_out:
            labels = make_batch.images.shards[adapter].labels
            chosen = torch.cat([index[:_IMAGES] for index in _classes(labels)[:_CLASSES]])
            ways = min(_WAYS, len(labels[chosen].unique()))
            drawn = sample_episodes(labels[chosen], ways, _SHOTS, _IMAGES - _SHOTS, _EPISODES, seed)
            self._images.append(make_batch.images.of_shard(adapter)[chosen])
            self._episodes.append(drawn)

    @property
    def images(self) -> torch.Tensor:
        """Numbers of all images that are forwarded: int64 (N,)."""
        return torch.cat(self._images)

    @torch.no_grad()
    def __call__(self, embed: Embed) -> torch.Tensor:
        """Per cent of queries that go to the wrong prototype, by episode: float32 (E,)."""
        features = []
        for index in self.images.split(_BATCH):
            beat("evaluation")
            features.append(embed(*self._make_batch.own_inputs(index), len(index)).float().cpu())
        parts = torch.cat(features).split([len(images) for images in self._images])
        errors = []
        for part, episodes in zip(parts, self._episodes, strict=True):
            try:
                errors.append(100 - prototype_accuracy(part, episodes, self._metric))
            except DataError:  # features that are not finite
                errors.append(torch.full((len(episodes),), 100.0))
        return torch.cat(errors)


def _classes(labels: torch.Tensor) -> list[torch.Tensor]:
    """Where each class of enough images for an episode has them."""
    indices = [(labels == c).nonzero().flatten() for c in labels.unique().tolist()]
    return [index for index in indices if len(index) > _SHOTS]
