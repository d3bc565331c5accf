"""How sure a fitted task is: a temperature from its own support images, by leave-one-out."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .heads import FewShotHead
from .heads.prototypes import PrototypeHead


#: Factors of the head's temperature that are compared: an eighth to eight times, the least first.
FACTORS = tuple(2.0 ** (step / 4) for step in range(-12, 13))
#: Of a task that has a class with one image, which leaves nothing to leave out. Chosen on validation episodes, as the
#: other two are (examples/studies/calibration.py).
ONE_SHOT_FACTOR = 2.0**0.5
#: The factor that a support set is expected to give, and how far its logarithm lies from that (one standard
#: deviation). Images that all agree would otherwise ask for a temperature of zero.
EXPECTED_FACTOR, SPREAD = 1.0, 0.25
#: Most support images that are left out in turn; of more, evenly spread ones.
MOST_LEFT_OUT = 1000


def support_factor(head: FewShotHead, features: torch.Tensor, labels: torch.Tensor, num_classes: int) -> float:
    """What the head's scores are to be divided by, so that its probabilities are about as often right as they say.

    Each support image is scored against prototypes that are made without it. The factor is that of `FACTORS` with the
    least cross-entropy of these scores, summed, and a normal prior on its logarithm (temperature scaling,
    arXiv 1706.04599). Division changes no answer.

    Args:
        features: support embeddings (N, D).
        labels: int64 (N,), values 0 to `num_classes` - 1, each present.

    Returns:
        `ONE_SHOT_FACTOR` where a class has one image, and 1 of a head that does not score by prototypes.
    """
    if not isinstance(head, PrototypeHead):
        return 1.0
    counts = torch.bincount(labels, minlength=num_classes)
    if int(counts.min()) < 2:
        return ONE_SHOT_FACTOR
    return best_factor(leave_one_out(head, features.float(), labels, num_classes), labels[_left_out(labels)])


def leave_one_out(head: PrototypeHead, features: torch.Tensor, labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Scores of support images (M, C), each by prototypes made without it: M of (N, D), at most `MOST_LEFT_OUT`."""
    rows = _left_out(labels)
    own, shown = labels[rows], features[rows]
    statistics = head.statistics(features, labels, num_classes)
    scores = head.logits(shown, head.prepare(statistics))
    rest = {
        "sums": (statistics["sums"][own] - shown)[:, None],  # (M, 1, D): one class for each image
        "counts": (statistics["counts"][own] - 1)[:, None],
    }
    without = head.logits(shown[:, None], head.prepare(rest))  # (M, 1, 1)
    return scores.scatter(1, own[:, None], without.flatten()[:, None])


def best_factor(
    scores: torch.Tensor, labels: torch.Tensor, expected: float = EXPECTED_FACTOR, spread: float = SPREAD
) -> float:
    """The factor of `FACTORS` that scores (N, C) are to be divided by, given their labels (N,) and the prior."""
    factors = torch.tensor(FACTORS, dtype=torch.float64)
    losses = torch.stack([F.cross_entropy(scores.double() / factor, labels, reduction="sum") for factor in FACTORS])
    prior = (factors.log() - torch.tensor(expected).double().log()).square() / (2 * spread**2)
    return FACTORS[int((losses.cpu() + prior).argmin())]


def _left_out(labels: torch.Tensor) -> torch.Tensor:
    count = min(len(labels), MOST_LEFT_OUT)
    return torch.arange(count, device=labels.device) * len(labels) // count
