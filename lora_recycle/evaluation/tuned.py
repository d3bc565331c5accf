"""Methods that tune on each support set, on many episodes: what tuning does not change is computed once."""

from __future__ import annotations

import time
from typing import cast

import torch

from ..fewshot.episodes import Episode, EpisodeSet
from ..finetuning import TaskNetwork, TaskTuning, TaskTuningConfig
from ..modeling.meta_lora import MetaLoRAForFewShotClassification
from ..modeling.tuning import default_config
from ..pool.pool import AdapterPool
from .memory import peak_bytes


class MetaLoRATuning(TaskTuning):
    """[`MetaLoRAForFewShotClassification.tune`] as a method beside the others, for many tasks of one model.

    PVP's idea (arXiv 2304.13639): tuning starts from an adapter that was trained for few-shot tasks.
    """

    def __init__(self, model: MetaLoRAForFewShotClassification, config: TaskTuningConfig | None = None):
        super().__init__(config or default_config(model.head))
        self.model = model

    def network(self, pool: AdapterPool | None = None) -> TaskNetwork:
        return self.model.tuning_network(self.config)


def tuned_accuracy(
    method: TaskTuning,
    pool: AdapterPool | None,
    pixels: torch.Tensor,
    episodes: EpisodeSet,
    *,
    memory: bool = False,
) -> tuple[torch.Tensor, dict[str, float]]:
    """Per-episode accuracy, in per cent, of a method that tunes.

    Args:
        pool: for methods that use one, or its backbone.
        pixels: uint8 (N, 3, H, W), the images that the episodes index.
        memory: whether to measure that of the first task, which runs once more for it.

    Returns:
        (E,) accuracies, and costs: seconds by `image` (its tokens) and `task` (tuning and scoring), and, where
        measured, `bytes` held at most while tuning on a task.
    """
    network = method.network(cast(AdapterPool, pool))  # None for methods that use none
    used = torch.cat([torch.cat([one.support.flatten(), one.query]) for one in episodes]).unique()
    started = time.perf_counter()
    tokens = network.tokens(pixels[used])
    costs = {"image": (time.perf_counter() - started) / len(used)}
    place = torch.full((len(pixels),), -1)
    place[used] = torch.arange(len(used))
    labels = torch.arange(episodes.ways).repeat_interleave(episodes.shots)

    def scores(one: Episode) -> torch.Tensor:
        support, queries = tokens[place[one.support.flatten()]], tokens[place[one.query]]
        return method.scores(network, support, labels, episodes.ways, queries)

    started = time.perf_counter()
    hits = [(scores(one).argmax(1) == one.query_labels).float().mean() for one in episodes]
    costs["task"] = (time.perf_counter() - started) / len(episodes)
    if memory:
        costs["bytes"] = peak_bytes(lambda: scores(episodes.episodes[0]), network.backbone.device)
    network.reset()
    return 100.0 * torch.stack(hits), costs
