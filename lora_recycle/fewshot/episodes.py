"""Few-shot episodes drawn from labels alone, so that every method is judged on the same ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from ..errors import ConfigError, DataError
from ..runtime.terminal import counted


_NAMED_LEFT_OUT = 5  # classes left out are named one by one up to here, then counted


@dataclass
class Episode:
    """One few-shot task, as indices into the images that the labels came from.

    Args:
        support (`torch.LongTensor`): (ways, shots) indices of the support images, row w for way w.
        query (`torch.LongTensor`): (Q,) indices of the query images, Q = ways x queries or fewer.
        query_labels (`torch.LongTensor`): (Q,) the way, 0 to ways - 1, of each query image.
        classes (`torch.LongTensor`): (ways,) the label behind each way.
    """

    support: torch.Tensor
    query: torch.Tensor
    query_labels: torch.Tensor
    classes: torch.Tensor


@dataclass
class EpisodeSet:
    """Episodes of one kind; `notes` says in plain words where the data gave less than was asked."""

    episodes: list[Episode]
    ways: int
    shots: int
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.episodes)

    def __iter__(self) -> Iterator[Episode]:
        return iter(self.episodes)


def sample_episodes(
    labels: torch.Tensor,
    ways: int,
    shots: int,
    queries: int,
    episodes: int,
    seed: int,
    label_names: Sequence[str] | None = None,
    name: str = "the data",
) -> EpisodeSet:
    """Draw `episodes` tasks of `ways` classes with `shots` support and up to `queries` query images a class.

    The same labels, numbers and seed give the same episodes. A class with fewer than shots + queries images gives
    all it has left as queries; one with fewer than shots + 1 is left out; both are said in the notes.

    Args:
        labels (`torch.Tensor`): (N,) integer labels.
        label_names (`Sequence[str]`, *optional*): name of each label, for the notes.
        name (`str`, *optional*, defaults to `the data`): what the notes and errors call the images.

    Raises:
        ConfigError: `ways` or `episodes` below 2, `shots` or `queries` below 1.
        DataError: fewer usable classes than `ways`.
    """
    _check_numbers(ways, shots, queries, episodes)
    members = _members(labels, len(label_names or ()))
    usable = {label: own for label, own in members.items() if len(own) > shots}
    notes = _notes(members, shots, queries, label_names, name)
    if len(usable) < ways:
        raise DataError(
            f"{name}: {ways}-way {shots}-shot episodes need {ways} classes of at least {shots} + 1 images, "
            f"found {len(usable)} such classes among {len(members)}. {_way_out(members, len(usable), ways)}"
        )
    generator = torch.Generator().manual_seed(seed)
    drawn = [_draw(usable, ways, shots, queries, generator) for _ in range(episodes)]
    return EpisodeSet(drawn, ways, shots, notes)


def _way_out(members: dict[int, torch.Tensor], usable: int, ways: int) -> str:
    """How many ways, or how many shots, these classes do for."""
    sizes = sorted((len(own) for own in members.values()), reverse=True)
    shots = sizes[ways - 1] - 1 if len(sizes) >= ways else 0
    possible = [f"{usable} ways"] * (usable > 1) + [f"{shots} shot" + "s" * (shots > 1)] * (shots > 0)
    if not possible:
        return "Add classes, or images of each."
    command = f"--ways {usable}" if usable > 1 else f"--shots {shots}"
    return f"Ask for at most {' or '.join(possible)}. On the command line: {command}."


def _check_numbers(ways: int, shots: int, queries: int, episodes: int) -> None:
    if ways < 2:
        raise ConfigError(f"ways must be at least 2, got {ways}: a support set of one class leaves nothing to decide.")
    if shots < 1 or queries < 1:
        raise ConfigError(f"shots and queries must be at least 1, got {shots} and {queries}.")
    if episodes < 2:
        raise ConfigError(f"episodes must be at least 2 to give a confidence interval, got {episodes}.")


def _members(labels: torch.Tensor, named: int) -> dict[int, torch.Tensor]:
    """Indices of each label's images; labels that have a name but no image are there too, empty."""
    present = labels.unique().tolist()
    every = sorted(set(present) | set(range(named)))
    return {label: (labels == label).nonzero().flatten() for label in every}


def _draw(usable: dict[int, torch.Tensor], ways: int, shots: int, queries: int, generator: torch.Generator) -> Episode:
    candidates = torch.tensor(list(usable))
    classes = candidates[torch.randperm(len(candidates), generator=generator)[:ways]]
    support, query, query_labels = [], [], []
    for way, label in enumerate(classes.tolist()):
        own = usable[label]
        order = own[torch.randperm(len(own), generator=generator)[: shots + queries]]
        support.append(order[:shots])
        query.append(order[shots:])
        query_labels.append(torch.full((len(order) - shots,), way))
    return Episode(torch.stack(support), torch.cat(query), torch.cat(query_labels), classes)


def _notes(
    members: dict[int, torch.Tensor], shots: int, queries: int, label_names: Sequence[str] | None, name: str
) -> list[str]:
    sizes = {label: len(own) for label, own in members.items()}
    short = [size for size in sizes.values() if shots < size < shots + queries]
    left_out = [label for label, size in sizes.items() if size <= shots]
    notes = []
    if short:
        subject = "1 class has" if len(short) == 1 else f"{len(short)} classes have"
        notes.append(
            f"{name}: {subject} fewer than {shots} + {queries} images: fewer queries, {min(short) - shots} at least."
        )
    for label in left_out[:_NAMED_LEFT_OUT]:
        called = label_names[label] if label_names else label
        held = counted(sizes[label], "image")
        notes.append(f"{name}: class {str(called)!r} has {held}, fewer than {shots} + 1: left out.")
    if len(left_out) > _NAMED_LEFT_OUT:
        more = len(left_out) - _NAMED_LEFT_OUT
        notes.append(f"{name}: {more} more classes with fewer than {shots} + 1 images: left out.")
    return notes
