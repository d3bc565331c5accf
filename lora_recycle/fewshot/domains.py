"""Which of a pool's domains a support set belongs to, from its features in each network. Labels of domains are not
needed, nor images of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from ..errors import DataError
from .relations import cosine_similarity


#: The network of the whole pool, for support sets that fit no domain.
SHARED = "shared"
#: What an expert is to the choice: see [`Expert`].
ROLES = ("group", "part", "compared")
_LEAST_DISPLACEMENT, _LEAST_SEPARABILITY = 1e-12, 1e-4


@dataclass(frozen=True)
class Expert:
    """One domain of a pool: the average of adapters that are alike.

    Args:
        name: of the domain.
        role: `group`, a group of the pool that is not the largest; `part`, the more uniform half of the largest
            group; `compared`, the other half, which is never chosen and only shows whether the first is meant.
        share: of the pool's adapters, in (0, 1).
    """

    name: str
    role: str
    share: float


@dataclass(frozen=True)
class DomainRule:
    """The constants of [`choose_domain`]. docs/domains.md says on what each was chosen; none depends on the shots.

    Args:
        separability: a group must set the classes apart better than the shared network, by more than this log ratio.
        displacement: a group must move the images more than the shared network, by more than this share of
            `log(1 / share)`, the log of what averaging over the whole pool divides the group's own change by.
        lead: a part must move the images more than the other part, by more than this log ratio.
        part_separability: a part may set the classes apart a little worse than the shared network, by this log ratio.
        spread: the bare backbone must spread the classes at least by this share of how far it spreads procedural
            pictures. Domains whose images look alike to it are not those of a pool's largest group.
    """

    separability: float = 0.1
    displacement: float = 0.55
    lead: float = 0.1
    part_separability: float = -0.03
    spread: float = 0.57


@dataclass(frozen=True)
class DomainChoice:
    """The domain of a support set, and what the choice rests on.

    Args:
        name: of an expert, or `SHARED`.
        scores: by expert, the log ratios of its `separability` and its `displacement` to the shared network's; empty
            where the domain was given and not chosen.
    """

    name: str = SHARED
    scores: dict[str, dict[str, float]] = field(default_factory=dict)


def displacement(features: torch.Tensor, frozen: torch.Tensor) -> torch.Tensor:
    """How far a network moves images from where the bare backbone has them: mean of 1 - cosine.

    Args:
        features (`torch.Tensor`): (S, D), by the network.
        frozen (`torch.Tensor`): (S, D), by the bare backbone.

    Returns:
        `torch.Tensor`: a scalar in [0, 2].
    """
    return (1 - F.cosine_similarity(features.float(), frozen.float(), dim=-1)).mean()


def separability(features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cosine similarity between images of one class, less that between images of different classes.

    Fisher's criterion, within against between classes, in the geometry of cosine prototypes. An image is as similar
    to itself as can be, which is all that is known of a class with one image: where no class has two, the mean within
    is 1, and the networks are compared by how far they keep the classes apart.

    Args:
        features (`torch.Tensor`): (S, D).
        labels (`torch.Tensor`): int64 (S,).

    Returns:
        `torch.Tensor`: a scalar in [-2, 2].

    Raises:
        DataError: all images are of one class.
    """
    similarities, same = cosine_similarity(features.float()), _same_class(labels)
    pairs = same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    within = similarities[pairs].mean() if pairs.any() else similarities.new_ones(())
    return within - similarities[~same].mean()


def class_spread(features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """1 less the mean cosine similarity between images of different classes: (S, D), int64 (S,) to a scalar in [0, 2].

    Raises:
        DataError: all images are of one class.
    """
    return 1 - cosine_similarity(features.float())[~_same_class(labels)].mean()


def _same_class(labels: torch.Tensor) -> torch.Tensor:
    same = labels[:, None] == labels
    if same.all():
        raise DataError("separability needs support images of at least 2 classes, got 1.")
    return same


def choose_domain(
    frozen: torch.Tensor,
    shared: torch.Tensor,
    looks: Mapping[str, torch.Tensor],
    labels: torch.Tensor,
    experts: Sequence[Expert],
    reference_spread: float,
    rule: DomainRule | None = None,
) -> DomainChoice:
    """The domain that a support set belongs to, `SHARED` where it fits none.

    1. Of the groups that move the images clearly more than the shared network does, the one that sets the classes
       apart best, where it does so clearly better than the shared network.
    2. Else the part of the largest group, where it moves the images clearly more than the other part and the bare
       backbone spreads the classes as far as it spreads pictures of that kind.
    3. Else the shared network.

    Args:
        frozen: (S, D), the support images in the bare backbone.
        shared: (S, D), in the shared meta-LoRA.
        looks: (S, D) in each expert, by its name.
        labels: int64 (S,).
        experts: the pool's domains; none for a pool of one group.
        reference_spread: how far the bare backbone spreads procedural pictures, 1 less their mean cosine similarity.
        rule ([`DomainRule`], *optional*): the constants.

    Raises:
        DataError: all images are of one class.
    """
    rule = rule or DomainRule()
    sep, moved = separability(shared, labels), displacement(shared, frozen)
    scores = {
        one.name: {
            "separability": _log_ratio(separability(looks[one.name], labels), sep, _LEAST_SEPARABILITY),
            "displacement": _log_ratio(displacement(looks[one.name], frozen), moved, _LEAST_DISPLACEMENT),
        }
        for one in experts
    }
    name = _group(scores, experts, rule)
    if name is None and class_spread(frozen, labels) > rule.spread * reference_spread:
        name = _part(scores, experts, rule)
    return DomainChoice(name or SHARED, scores)


def _group(scores: dict[str, dict[str, float]], experts: Sequence[Expert], rule: DomainRule) -> str | None:
    moving = [
        one.name
        for one in experts
        if one.role == "group" and scores[one.name]["displacement"] > rule.displacement * math.log(1 / one.share)
    ]
    best = max(moving, key=lambda name: scores[name]["separability"], default=None)
    return best if best is not None and scores[best]["separability"] > rule.separability else None


def _part(scores: dict[str, dict[str, float]], experts: Sequence[Expert], rule: DomainRule) -> str | None:
    parts = [one for one in experts if one.role != "group"]
    if len(parts) < 2:
        return None
    first, second = sorted(parts, key=lambda one: -scores[one.name]["displacement"])[:2]
    leads = scores[first.name]["displacement"] - scores[second.name]["displacement"] > rule.lead
    apart = scores[first.name]["separability"] > rule.part_separability
    return first.name if first.role == "part" and leads and apart else None


def _log_ratio(value: torch.Tensor, base: torch.Tensor, least: float) -> float:
    return float((value.clamp_min(least) / base.clamp_min(least)).log())
