"""The three losses of a step, from the student's features of its images."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..fewshot.prototypes import prototype_logits
from ..fewshot.relations import relational_divergence
from .batches import Batch
from .config import DistillationConfig
from .episodes import SurrogateEpisode


def weighted_losses(config: DistillationConfig, features: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
    """Name to scalar, times its weight: `relational`, `kl` and `interpolation`, those that the batch is for.

    Args:
        features: (U, D) of the batch's images.
    """
    parts, losses = [features[rows] for rows in batch.parts], {}
    if batch.teachers:
        value = torch.zeros((), device=features.device)
        for teacher, weight in zip(batch.teachers, batch.weights, strict=True):
            divergence = relational_divergence(parts.pop(0), teacher.float(), config.similarity_scale)
            value = value + weight * divergence
        losses["relational"] = config.relational_weight * value
    for episode, logits in zip(batch.episodes, batch.logits, strict=True):
        name = "kl" if logits is not None else "interpolation"
        weight = config.kl_weight if name == "kl" else config.interpolation_weight
        value = episode_loss(config, episode, parts.pop(0), parts.pop(0), logits) * weight / config.episodes
        losses[name] = losses.get(name, 0.0) + value
    return losses


def episode_loss(
    config: DistillationConfig,
    episode: SurrogateEpisode,
    support: torch.Tensor,
    query: torch.Tensor,
    teacher: torch.Tensor | None,
) -> torch.Tensor:
    """KL to the source adapter's head (Eq. 7 of LoRA Recycle, T = 1), or cross-entropy where no teacher fits.

    Args:
        support: (ways x shots, D).
        query: (ways x queries, D).
        teacher: (ways x queries, ways) logits.
    """
    ways, queries = episode.query.shape
    prototypes = support.view(ways, -1, support.shape[-1]).mean(1)
    logits = prototype_logits(query, prototypes, config.metric, config.temperature)
    if teacher is None:
        return F.cross_entropy(logits, torch.arange(ways, device=logits.device).repeat_interleave(queries))
    return F.kl_div(logits.log_softmax(1), teacher.log_softmax(1), log_target=True, reduction="batchmean")
