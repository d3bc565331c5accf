"""Methods that tune on each support set, on many episodes: what tuning does not change is computed once."""

from __future__ import annotations

import time

import torch

from ..pool import AdapterPool
from ..task_tuning import TaskTuning
from .episodes import EpisodeSet


def tuned_accuracy(
    method: TaskTuning, pool: AdapterPool | None, pixels: torch.Tensor, episodes: EpisodeSet
) -> tuple[torch.Tensor, dict[str, float]]:
    """Per-episode accuracy, in per cent, of a method that tunes.

    Args:
        pool: for methods that use one, or its backbone.
        pixels: uint8 (N, 3, H, W), the images that the episodes index.

    Returns:
        (E,) accuracies, and seconds: `image` to get an image's tokens, `task` to tune on one task and score it.
    """
    network = method.network(pool)
    used = torch.cat([torch.cat([one.support.flatten(), one.query]) for one in episodes]).unique()
    started = time.perf_counter()
    tokens = network.tokens(pixels[used])
    image_seconds = (time.perf_counter() - started) / len(used)
    place = torch.full((len(pixels),), -1)
    place[used] = torch.arange(len(used))
    labels = torch.arange(episodes.ways).repeat_interleave(episodes.shots)
    found = torch.empty(len(episodes))
    started = time.perf_counter()
    for i, one in enumerate(episodes):
        support, queries = tokens[place[one.support.flatten()]], tokens[place[one.query]]
        guesses = method.scores(network, support, labels, episodes.ways, queries).argmax(1)
        found[i] = 100.0 * (guesses == one.query_labels).float().mean()
    network.reset()
    return found, {"image": image_seconds, "task": (time.perf_counter() - started) / len(episodes)}
