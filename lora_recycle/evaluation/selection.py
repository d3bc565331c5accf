"""Accuracy where each episode's support set chooses the network that classifies its queries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from ..fewshot.accuracy import prototype_accuracy
from ..fewshot.episodes import EpisodeSet
from ..merging.base import Choice


class Selected(NamedTuple):
    """(E,) per-episode accuracies, the mean number of networks that a support set was shown to, and int64 (E,), the
    network that each chose."""

    accuracies: torch.Tensor
    looks: float
    chosen: torch.Tensor


def selected_accuracy(
    features: Sequence[torch.Tensor],
    episodes: EpisodeSet,
    choice: Choice,
    score: Callable[[torch.Tensor, EpisodeSet], torch.Tensor] = prototype_accuracy,
) -> Selected:
    """Accuracy, in per cent, of the network that each episode's support set chooses.

    Args:
        features (`Sequence[torch.Tensor]`): T tensors (N, D), one for each network.
        choice: as a [`Selection`] makes it.
        score: (E,) accuracy of features on episodes; by default of cosine prototypes.

    Raises:
        DataError: features that are not finite.
    """
    labels = torch.arange(episodes.ways).repeat_interleave(episodes.shots)
    chosen, looks = zip(*(_chosen(features, one.support.flatten(), labels, choice) for one in episodes), strict=True)
    accuracies = torch.empty(len(episodes))
    for number in set(chosen):
        own = [i for i, c in enumerate(chosen) if c == number]
        part = EpisodeSet([episodes.episodes[i] for i in own], episodes.ways, episodes.shots)
        accuracies[own] = score(features[number], part)
    return Selected(accuracies, sum(looks) / len(looks), torch.tensor(chosen))


def _chosen(
    features: Sequence[torch.Tensor], support: torch.Tensor, labels: torch.Tensor, choice: Choice
) -> tuple[int, int]:
    """The network that the images `support` (S,) choose, and how many they were shown to."""
    seen: dict[int, torch.Tensor] = {}

    def look(number: int) -> torch.Tensor:
        return seen.setdefault(number, features[number][support].float())

    return choice(look, labels), len(seen)
