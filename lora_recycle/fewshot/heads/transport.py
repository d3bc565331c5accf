"""OpTA: prototypes carried to where the queries lie, by optimal transport."""

from __future__ import annotations

import math

import torch

from ...errors import ConfigError, DataError
from .base import FewShotHead, Tensors, unit


ITERATIONS = 100
TEMPERATURE = 0.1
_MOST_PASSES = 100


class TransportHead(FewShotHead):
    """Optimal-transport alignment of the prototypes with the queries (OpTA of BECLR, arXiv 2402.02444).

    Each class has to take an equal share of the queries, at the least squared distance with some entropy; a prototype
    then moves to the mean of its share. After some passes the queries go to the nearest prototype by cosine. So it
    needs queries of all classes, about as many of each: others are shared out all the same.

    Args:
        entropy (`float`): of the plan, where the largest cost is 1.
        passes (`int`): how often the prototypes move, at most 100. Both defaults were chosen on validation classes
            (`examples/studies/choose_heads.py`).

    Raises:
        ConfigError: more passes.
    """

    name = "transductive_transport"
    transductive = True

    def __init__(self, entropy: float = 0.05, passes: int = 2):
        if passes > _MOST_PASSES:  # a sidecar of a stranger may ask for them
            raise ConfigError(f"passes must be at most {_MOST_PASSES}, got {passes}.")
        self.entropy, self.passes = float(entropy), int(passes)

    def prepare(self, statistics: Tensors) -> Tensors:
        return {"prototypes": unit(self.prototypes(statistics))}

    def logits(self, features: torch.Tensor, prepared: Tensors) -> torch.Tensor:
        prototypes, features = prepared["prototypes"], unit(features)
        if features.shape[-2] < prototypes.shape[-2]:
            raise DataError(
                f"{self.name} shares out the queries to the classes, so it needs at least as many queries as classes: "
                f"got {features.shape[-2]} for {prototypes.shape[-2]}. Give all images in one call, or use "
                "another head."
            )
        for _ in range(self.passes):
            cost = torch.cdist(prototypes, features).square()
            plan = sinkhorn(cost / cost.amax((-2, -1), keepdim=True), self.entropy, ITERATIONS)
            prototypes = plan / plan.sum(-1, keepdim=True) @ features
        return unit(features) @ unit(prototypes).mT / TEMPERATURE


def sinkhorn(cost: torch.Tensor, entropy: float, iterations: int) -> torch.Tensor:
    """Transport plan between uniform weights that minimises cost - entropy x H(plan) (Cuturi, arXiv 1306.0895).

    Computed with logarithms, so that a small entropy neither overflows nor divides by 0.

    Args:
        cost: (..., C, Q).

    Returns:
        (..., C, Q), rows that sum to 1 / C and, exactly, columns that sum to 1 / Q.
    """
    kernel = -cost / entropy
    rows, columns = -math.log(cost.shape[-2]), -math.log(cost.shape[-1])
    right = torch.zeros_like(kernel[..., :1, :])
    for _ in range(iterations):
        left = rows - (kernel + right).logsumexp(-1, keepdim=True)
        right = columns - (kernel + left).logsumexp(-2, keepdim=True)
    return (kernel + left + right).exp()
