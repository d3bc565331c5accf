"""Few-shot class-incremental learning (FSCIL): a base session of many classes, then sessions of a few new ones.

The protocol of TOPIC (arXiv 2004.10956): after each session all classes so far are distinguished, without the images
of earlier sessions. Heads learn by adding up statistics, which is what `add_classes` does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from ..errors import ConfigError, DataError
from ..fewshot.heads import FewShotHead


@dataclasses.dataclass
class Sessions:
    """Images of each session, as indices into the images that the labels came from.

    Args:
        support: for each session (S,) indices of its support images, with `support_labels`.
        query: for each session (Q,) indices of the test images of its own classes, with `query_labels`.

    Labels number the classes in the order in which they come.
    """

    support: list[torch.Tensor]
    support_labels: list[torch.Tensor]
    query: list[torch.Tensor]
    query_labels: list[torch.Tensor]

    def __len__(self) -> int:
        return len(self.support)


def draw_sessions(
    labels: torch.Tensor,
    sessions: Sequence[Sequence[int]],
    *,
    shots: int = 5,
    queries: int = 100,
    base_shots: int | None = None,
    seed: int = 0,
) -> Sessions:
    """Draw the images of every session: the same labels, numbers and seed give the same ones.

    Args:
        labels: int64 (N,).
        sessions: the labels of each session's classes, those of the base session first.
        shots: support images of each class after the base session.
        queries: test images of each class, drawn first.
        base_shots: support images of each base class; by default all that are no test images.

    Raises:
        ConfigError: `shots` or `queries` below 1, or a class in two sessions.
        DataError: a class with too few images.
    """
    if min(shots, queries, base_shots or 1) < 1:
        raise ConfigError(f"shots and queries must be at least 1, got {shots}, {queries} and {base_shots}.")
    classes = [label for session in sessions for label in session]
    if len(set(classes)) < len(classes):
        raise ConfigError(f"{len(classes) - len(set(classes))} classes are in more than one session.")
    generator, number, parts = torch.Generator().manual_seed(seed), 0, []
    for index, session in enumerate(sessions):
        support, support_labels, query, query_labels = [], [], [], []
        wanted = base_shots if index == 0 else shots
        for label in session:
            members = (labels == label).nonzero().flatten()
            if len(members) < queries + (wanted or 1):
                raise DataError(f"class {label} has {len(members)} images, {queries} + {wanted or 1} are needed.")
            members = members[torch.randperm(len(members), generator=generator)]
            query.append(members[:queries])
            support.append(members[queries:] if wanted is None else members[queries : queries + wanted])
            query_labels.append(torch.full((queries,), number))
            support_labels.append(torch.full((len(support[-1]),), number))
            number += 1
        parts.append([torch.cat(part) for part in (support, support_labels, query, query_labels)])
    return Sessions(*map(list, zip(*parts, strict=True)))


@torch.no_grad()
def session_accuracies(features: torch.Tensor, sessions: Sessions, head: FewShotHead) -> dict[str, torch.Tensor]:
    """Accuracy in per cent after each session.

    Args:
        features: (N, D) of all images, any float type.
        head: told the support images of one session after the other; the earlier ones are not shown again.

    Returns:
        `all`: (sessions,) over the test images of all classes seen so far; `base` and `new`: the same over those of
        the base session's classes alone and of the others alone (not a number after the base session).
    """
    features, statistics, base = features.float(), None, int(sessions.support_labels[0].max()) + 1
    accuracies = {name: torch.full((len(sessions),), float("nan")) for name in ("all", "base", "new")}
    for i in range(len(sessions)):
        labels = sessions.support_labels[i]
        known = int(labels.max()) + 1
        later = head.statistics(features[sessions.support[i]], labels, known)
        statistics = later if statistics is None else head.merged(statistics, later)
        truth = torch.cat(sessions.query_labels[: i + 1])
        logits = head.logits(features[torch.cat(sessions.query[: i + 1])], head.prepare(statistics))
        right = 100.0 * (logits.argmax(1) == truth)
        accuracies["all"][i], accuracies["base"][i] = right.mean(), right[truth < base].mean()
        accuracies["new"][i] = right[truth >= base].mean()  # of nothing: not a number
    return accuracies
