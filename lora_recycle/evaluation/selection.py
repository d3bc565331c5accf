"""Accuracy where each episode's support set chooses the network that classifies its queries."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..fewshot.accuracy import prototype_accuracy
from ..fewshot.episodes import EpisodeSet
from ..merging.base import Choice


def selected_accuracy(
    features: Sequence[torch.Tensor], episodes: EpisodeSet, choice: Choice
) -> tuple[torch.Tensor, float]:
    """Accuracy, in per cent, of the cosine prototypes of the network that each episode's support set chooses.

    Args:
        features (`Sequence[torch.Tensor]`): T tensors (N, D), one for each network.
        choice: as a [`Selection`] makes it.

    Returns:
        (E,) per-episode accuracy, and the mean number of networks that a support set was shown to.

    Raises:
        DataError: features that are not finite.
    """
    labels = torch.arange(episodes.ways).repeat_interleave(episodes.shots)
    chosen, looks = zip(*(_chosen(features, one.support.flatten(), labels, choice) for one in episodes), strict=True)
    accuracies = torch.empty(len(episodes))
    for number in set(chosen):
        own = [i for i, c in enumerate(chosen) if c == number]
        part = EpisodeSet([episodes.episodes[i] for i in own], episodes.ways, episodes.shots)
        accuracies[own] = prototype_accuracy(features[number], part)
    return accuracies, sum(looks) / len(looks)


def _chosen(
    features: Sequence[torch.Tensor], support: torch.Tensor, labels: torch.Tensor, choice: Choice
) -> tuple[int, int]:
    """The network that the images `support` (S,) choose, and how many they were shown to."""
    seen: dict[int, torch.Tensor] = {}

    def look(number: int) -> torch.Tensor:
        return seen.setdefault(number, features[number][support].float())

    return choice(look, labels), len(seen)
