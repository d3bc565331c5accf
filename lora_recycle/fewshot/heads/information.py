"""TIM: prototypes that make the queries' classes certain one by one and even as a whole."""

from __future__ import annotations

import torch

from ...errors import ConfigError
from .base import Tensors, TransductiveHead, unit


_MOST_STEPS = 1000
_TINY = 1e-12  # so that a class that no query takes divides nothing by 0


class InformationHead(TransductiveHead):
    """Transductive information maximisation, by alternating directions (TIM-ADM, arXiv 2008.11297).

    Prototypes and assignments of the queries take turns to lower the cross-entropy of the support images, weighted by
    `support_weight`, minus the entropy of the classes' shares of the queries, plus `certainty` times the mean entropy
    of a query's assignment. Shares are drawn to equality: it needs queries of all classes, about as many of each. The
    defaults of the three weights and of the steps are the paper's.

    Args:
        temperature (`float`): the squared distances, of unit embeddings, are multiplied by half of it. Chosen on
            validation classes (`examples/studies/choose_heads.py`); the paper has 15.
        support_weight (`float`): of the cross-entropy of the support images.
        certainty (`float`): of the mean entropy of a query's assignment.
        steps (`int`): turns of both, at most 1,000.

    Raises:
        ConfigError: more steps, or a weight that is not positive.
    """

    name = "transductive_information"

    def __init__(
        self, temperature: float = 5.0, support_weight: float = 0.1, certainty: float = 0.1, steps: int = 150
    ):
        if steps > _MOST_STEPS:  # a sidecar of a stranger may ask for them
            raise ConfigError(f"steps must be at most {_MOST_STEPS}, got {steps}.")
        if not (support_weight > 0 and certainty > 0 and temperature > 0):
            raise ConfigError(
                f"temperature, support_weight and certainty must be positive, got {temperature}, {support_weight} and "
                f"{certainty}."
            )
        self.temperature, self.steps = float(temperature), int(steps)
        self.support_weight, self.certainty = float(support_weight), float(certainty)

    def logits(self, features: torch.Tensor, prepared: Tensors) -> torch.Tensor:
        support, members, weights = (prepared[name] for name in ("support", "members", "prototypes"))
        features = unit(features)
        of_support = self.support_weight / (1 + self.certainty)
        of_queries = support.shape[-2] / max(features.shape[-2], 1)
        for _ in range(self.steps):
            predicted = self._scores(features, weights).softmax(-1)  # (..., Q, C)
            assigned = self._assigned(predicted)
            known = self._scores(support, weights).softmax(-1)  # (..., N, C)
            total = of_support * _pull(weights, support, members, known)
            total = total + of_queries * _pull(weights, features, assigned, predicted)
            norm = of_support * members.sum(-2) + of_queries * assigned.sum(-2)
            weights = total / norm[..., None]
        return self._scores(features, weights)

    def _scores(self, features: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self.temperature * (features @ weights.mT - weights.square().sum(-1).unsqueeze(-2) / 2)

    def _assigned(self, predicted: torch.Tensor) -> torch.Tensor:
        """The assignments that are best for these predictions (..., Q, C): proposition 1 of the paper."""
        sharp = predicted ** (1 + self.certainty)
        even = sharp / (sharp.sum(-2, keepdim=True) + _TINY).sqrt()
        return even / even.sum(-1, keepdim=True)


def _pull(weights: torch.Tensor, features: torch.Tensor, wanted: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """The sum of what a class wants, less what it has, plus its prototype as often as it has any: (..., C, D)."""
    return (wanted - found).mT @ features + weights * found.sum(-2)[..., None]
