"""The few-shot protocol: accuracy of prototypes on stored features, confidence intervals, paired differences.

Pure functions on tensors: features of all images are computed once, by whatever method, and judged here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence

from ..errors import ConfigError, DataError
from .episodes import Episode, EpisodeSet
from .heads import FewShotHead


METRICS = ("cosine", "euclidean")
_CHUNK_ELEMENTS = 4_000_000  # gathered query features at a time: 16 MB, stays near the cache


def prototype_accuracy(
    features: torch.Tensor, episodes: EpisodeSet, metric: str = "cosine", centred: bool = False
) -> torch.Tensor:
    """Accuracy of the nearest prototype, in per cent.

    Args:
        features (`torch.Tensor`): (N, D) features of all images, any float type.
        episodes (`EpisodeSet`): E episodes that index them.
        metric (`str`, *optional*, defaults to `cosine`): `cosine` or (squared) `euclidean`.
        centred (`bool`, *optional*, defaults to `False`): subtract the mean of the episode's support features first.

    Returns:
        `torch.Tensor`: (E,) per-episode accuracy.

    Raises:
        ConfigError: another metric.
        DataError: features that are not finite.
    """
    if metric not in METRICS:
        raise ConfigError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}.")
    return _accuracy([features], episodes, metric, centred)


def ensemble_accuracy(features: Iterable[torch.Tensor], episodes: EpisodeSet) -> torch.Tensor:
    """Accuracy, in per cent, of the mean over teachers of the cosine similarity to each teacher's own prototypes.

    Args:
        features (`torch.Tensor` or iterable of tensors): (T, N, D), or T tensors (N, D_t), float16 accepted.
            One teacher at a time is converted to float32, so an iterable may compute them as it goes.

    Returns:
        `torch.Tensor`: (E,) per-episode accuracy.

    Raises:
        DataError: no teacher, or features that are not finite.
    """
    return _accuracy(features, episodes, "cosine", centred=False)


@torch.no_grad()
def head_accuracy(features: torch.Tensor, episodes: EpisodeSet, head: FewShotHead) -> torch.Tensor:
    """Accuracy, in per cent, of a few-shot head: many episodes at once, each with its queries as one set.

    Args:
        features (`torch.Tensor`): (N, D) features of all images, any float type.
        head ([`FewShotHead`]): of `modeling.heads`.

    Returns:
        `torch.Tensor`: (E,) per-episode accuracy.

    Raises:
        DataError: features that are not finite, or too few queries for the head.
    """
    _check_finite(features)
    features, every = features.float(), list(episodes)
    accuracies = torch.empty(len(every))
    sizes: dict[int, list[int]] = {}  # episodes of as many queries go together: padding would be queries, too
    for i, episode in enumerate(every):
        sizes.setdefault(len(episode.query), []).append(i)
    for queries, members in sizes.items():
        support, query, labels = (
            torch.stack([getattr(every[i], name) for i in members]) for name in ("support", "query", "query_labels")
        )
        way = torch.arange(episodes.ways).repeat_interleave(episodes.shots)  # of each support image
        # a head may hold a matrix of (D, D) for each episode
        for part in _chunks(len(members), max(way.numel() + queries, features.shape[1]), features.shape[1]):
            shots = features[support[part].flatten(1)]  # (e, W x S, D)
            logits = head.classify(shots, way.expand(len(shots), -1), episodes.ways, features[query[part]])
            accuracies[members[part]] = 100.0 * (logits.argmax(-1) == labels[part]).sum(1) / queries
    return accuracies


def _accuracy(features: Iterable[torch.Tensor], episodes: EpisodeSet, metric: str, centred: bool) -> torch.Tensor:
    """(E,) accuracy of the summed similarities of all members of `features`, each (N, D)."""
    support, query, labels = _collate(episodes)
    total = None
    for member in features:
        similarities = _similarities(member.float(), support, query, metric, centred)
        total = similarities if total is None else total.add_(similarities)
    if total is None:
        raise DataError("no features to judge: the pool is empty.")
    correct = (total.argmax(-1) == labels).sum(1)  # padded queries are labelled -1, never correct
    return 100.0 * correct / (labels >= 0).sum(1)


def _collate(episodes: EpisodeSet) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(E, W, S) support, (E, Q) query, (E, Q) labels; shorter query sets padded with image 0 and label -1."""
    every: list[Episode] = list(episodes)
    support = torch.stack([episode.support for episode in every])
    query = pad_sequence([episode.query for episode in every], batch_first=True)
    labels = pad_sequence([episode.query_labels for episode in every], batch_first=True, padding_value=-1)
    return support, query, labels


def _similarities(
    features: torch.Tensor, support: torch.Tensor, query: torch.Tensor, metric: str, centred: bool
) -> torch.Tensor:
    """(E, Q, W) similarity of each query to each prototype, from (N, D) features."""
    _check_finite(features)
    # Without centring the queries are normalised once per image, not once per episode
    queries = normalize(features, dim=-1) if metric == "cosine" and not centred else features
    scores = []
    for part in _chunks(len(support), support[0].numel() + query.shape[1], features.shape[1]):
        shots = features[support[part]]  # (e, W, S, D)
        prototypes, asked = shots.mean(2), queries[query[part]]  # (e, W, D), (e, Q, D)
        if centred:
            mean = shots.mean((1, 2)).unsqueeze(1)  # (e, 1, D)
            prototypes, asked = prototypes - mean, asked - mean
        if metric == "euclidean":
            scores.append(-torch.cdist(asked, prototypes).square())
        else:
            asked = normalize(asked, dim=-1) if centred else asked
            scores.append(asked @ normalize(prototypes, dim=-1).transpose(1, 2))
    return torch.cat(scores)


def _check_finite(features: torch.Tensor) -> None:
    if not features.isfinite().all():
        raise DataError("features hold NaN or infinite values: check the weights of the adapter.")


def _chunks(episodes: int, images: int, width: int) -> Iterator[slice]:
    step = max(1, _CHUNK_ELEMENTS // (images * width))
    return (slice(start, start + step) for start in range(0, episodes, step))
