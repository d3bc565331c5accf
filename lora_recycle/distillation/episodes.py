"""Episodes drawn from surrogate data, and which classes of different adapters are the same thing."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import torch

from ..errors import DataError
from ..surrogate.shards import ShardRows
from .config import DistillationConfig
from .surrogate_images import SurrogateImages
from .teachers import TeacherGroup


@dataclasses.dataclass(frozen=True)
class SurrogateEpisode:
    """Indices of images in the concatenated surrogate data.

    `support` (ways, shots) and `query` (ways, queries); `source` is the shard of a single-source episode and `classes`
    its (ways,) classes in that adapter's head; both None for an interpolated one.
    """

    support: torch.Tensor
    query: torch.Tensor
    source: int | None = None
    classes: torch.Tensor | None = None


def class_identities(
    shards: list[ShardRows], votes: dict[tuple[int, int, int], int] | None = None
) -> dict[tuple[int, int], int]:
    """Give every (shard, class) the number of the thing it shows, equal for two adapters that know the same class.

    Two classes are the same if their label names are (ignoring case and separators), or, where one of the adapters
    has no names, if each adapter takes most of the other's images of the class for its own class. Time is linear in
    classes x teachers of a group: names are looked up, and only teachers have votes.

    Args:
        votes: (teacher, shard, class) to the teacher's own class, from [`teach`], for adapters without names.
    """
    identity: dict[tuple[int, int], int] = {}
    known: dict[str, int] = {}
    seen_as: dict[tuple[int, int], list[tuple[int, int]]] = {}
    votes = votes or {}
    for (t, s, c), d in sorted(votes.items()):
        if t < s:
            seen_as.setdefault((s, c), []).append((t, d))
    number = 0
    for s, shard in enumerate(shards):
        names = shard.adapter.get("labels")
        for c in shard.labels.unique().tolist():
            name = "".join(ch for ch in names[c].lower() if ch.isalnum()) if names else None
            match = known.get(name) if name else None
            if match is None:
                candidates = [key for key in seen_as.get((s, c), ()) if votes.get((s, *key)) == c and key in identity]
                nameless = [key for key in candidates if not (name and shards[key[0]].adapter.get("labels"))]
                match = identity[nameless[0]] if nameless else None
            if match is None:
                match, number = number, number + 1
            identity[s, c] = match
            if name:
                known[name] = match
    return identity


class EpisodeSampler:
    """Draws episodes of both kinds.

    Args:
        images: the surrogate images of the adapters.
        identities: from [`class_identities`].
        held_out: adapters whose images no episode may have.

    Raises:
        DataError: too few classes hold enough images.
    """

    def __init__(
        self,
        images: SurrogateImages,
        identities: dict[tuple[int, int], int],
        ways: int,
        shots: int,
        queries: int,
        held_out: Collection[int] = (),
    ):
        self.ways, self.shots, self.queries, self.identities = ways, shots, queries, identities
        needed = shots + 1
        self.images: dict[tuple[int, int], torch.Tensor] = {}
        for s, shard in enumerate(images.shards):
            numbers, labels = images.of_shard(s), shard.labels
            for c in labels.unique().tolist() if s not in held_out else ():
                if (index := numbers[labels == c]).numel() >= needed:
                    self.images[s, c] = index
        by_shard: dict[int, list[int]] = {}
        for s, c in self.images:
            by_shard.setdefault(s, []).append(c)
        self.by_shard = {s: classes for s, classes in by_shard.items() if len(classes) >= ways}
        self.things: dict[int, list[tuple[int, int]]] = {}
        for key in self.images:
            self.things.setdefault(identities[key], []).append(key)
        if len(self.things) < ways:
            raise DataError(
                f"The surrogate data has {len(self.things)} different classes of {needed} images or more, "
                f"fewer than the {ways} of an episode. (Adapters that "
                "`validation_fraction` keeps from teaching do not count.)"
            )

    def single_source(self, generator: torch.Generator) -> SurrogateEpisode:
        """All classes from one adapter, so that its own head can teach."""
        if not self.by_shard:
            raise DataError(f"No adapter has {self.ways} classes of {self.shots + 1} surrogate images or more.")
        sources = list(self.by_shard)
        source = sources[_draw(len(sources), 1, generator)[0]]
        classes = [self.by_shard[source][i] for i in _draw(len(self.by_shard[source]), self.ways, generator)]
        support, query = self._images([(source, c) for c in classes], generator)
        return SurrogateEpisode(support, query, source, torch.tensor(classes))

    def interpolated(self, generator: torch.Generator) -> SurrogateEpisode:
        """Classes mixed from several adapters (cross-task interpolation), no thing twice under two adapters."""
        things = list(self.things)
        chosen = [self.things[things[i]] for i in _draw(len(things), self.ways, generator)]
        keys = [owners[_draw(len(owners), 1, generator)[0]] for owners in chosen]
        return SurrogateEpisode(*self._images(keys, generator))

    def _images(self, keys: list[tuple[int, int]], generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        queries = min(self.queries, min(len(self.images[key]) for key in keys) - self.shots)
        rows = [self.images[k][torch.randperm(len(self.images[k]), generator=generator)] for k in keys]
        support = torch.stack([row[: self.shots] for row in rows])
        return support, torch.stack([row[self.shots : self.shots + queries] for row in rows])


def _draw(population: int, count: int, generator: torch.Generator) -> list[int]:
    return torch.randperm(population, generator=generator)[:count].tolist()


def make_sampler(
    images: SurrogateImages, config: DistillationConfig, groups: list[TeacherGroup], held_out: Collection[int]
) -> EpisodeSampler | None:
    """The sampler of a recipe, None where that has no episodes. For `held_out` see [`EpisodeSampler`]."""
    if not (config.kl_weight or config.interpolation_weight):
        return None
    votes = {key: said for group in groups for key, said in group.votes.items()}
    identities = class_identities(images.shards, votes)
    return EpisodeSampler(images, identities, config.ways, config.shots, config.queries, held_out)
