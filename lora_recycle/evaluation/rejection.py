"""How well a model detects images of no class, and how well its confidence is calibrated."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F

from ..errors import ConfigError
from ..fewshot.episodes import EpisodeSet


#: Scores of a query, all higher for what belongs to a class; see [`known_scores`].
SCORES = ("max_softmax", "max_cosine", "energy")


@dataclasses.dataclass
class OpenTask:
    """One task with strangers among its queries.

    Args:
        logits: (K + U, W) cosine similarities of queries to the W prototypes: K of these classes, then U others.
        labels: int64 (K,) the right class of the first K.
    """

    logits: torch.Tensor
    labels: torch.Tensor


def open_tasks(features: torch.Tensor, episodes: EpisodeSet) -> list[OpenTask]:
    """Tasks of the first half of each episode's classes; queries of the other half are strangers.

    Args:
        features: (N, D) of all images.
        episodes: of twice as many ways as the tasks are to have.

    Raises:
        ConfigError: an odd number of ways, or fewer than four.
    """
    if episodes.ways < 4 or episodes.ways % 2:
        raise ConfigError(f"open tasks need episodes of an even number of ways, at least 4, got {episodes.ways}.")
    ways, tasks = episodes.ways // 2, []
    for episode in episodes:
        prototypes = F.normalize(features[episode.support[:ways]].float().mean(1), dim=-1)
        queries = F.normalize(features[episode.query].float(), dim=-1)
        known = episode.query_labels < ways
        logits = torch.cat([queries[known], queries[~known]]) @ prototypes.mT
        tasks.append(OpenTask(logits, episode.query_labels[known]))
    return tasks


def known_scores(logits: torch.Tensor, score: str, temperature: float) -> torch.Tensor:
    """How much a query looks like one of the classes: cosine similarities (Q, W) to (Q,).

    `max_softmax`: probability of the best class (arXiv 1610.02136); `max_cosine`: similarity to the best class;
    `energy`: T log sum exp(similarity / T) (arXiv 2010.03759).
    """
    if score not in SCORES:
        raise ConfigError(f"score must be one of {', '.join(SCORES)}, got {score!r}.")
    if score == "max_cosine":
        return logits.max(1).values
    if score == "energy":
        return temperature * (logits / temperature).logsumexp(1)
    return (logits / temperature).softmax(1).max(1).values


def expected_calibration_error(confidence: torch.Tensor, correct: torch.Tensor, bins: int = 15) -> float:
    """Mean gap between confidence and accuracy over bins of equal width, in per cent (arXiv 1706.04599).

    Args:
        confidence: (Q,) between 0 and 1.
        correct: bool (Q,).
    """
    place = (confidence * bins).long().clamp_max(bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, place, confidence.double() - correct.double())
    return 100.0 * (gaps.abs().sum() / len(confidence)).item()


def fit_temperature(tasks: list[OpenTask]) -> float:
    """The temperature of least cross-entropy on the queries of known classes, on a grid of 5 % steps."""
    grid = 0.005 * 1.05 ** torch.arange(120)
    losses = torch.zeros(len(grid))
    for task in tasks:
        known = task.logits[: len(task.labels)]
        scaled = known[None] / grid[:, None, None]
        losses += (
            F.cross_entropy(scaled.flatten(0, 1), task.labels.repeat(len(grid)), reduction="none")
            .view(len(grid), -1)
            .mean(1)
        )
    return grid[losses.argmin()].item()
