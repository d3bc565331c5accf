"""UNEM: generalised expectation-maximisation over the queries, its parameters learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...errors import ConfigError
from .base import Tensors, TransductiveHead, unit


LAYERS = 10
_SMALLEST_SHARE = 1e-6  # of the queries, so that the logarithm of a class without any stays finite


class UnrolledEMHead(TransductiveHead):
    """Gaussian classes fitted to support and queries by a fixed number of EM iterations (UNEM, arXiv 2412.16739).

    A class mean is that of its support images and of the queries assigned to it, all of unit length.
    Each iteration is a layer with parameters of its own. It assigns the queries by their distance to the class means
    and the classes' shares of the queries, then moves means and shares. [`fit_head`] learns the parameters on
    surrogate episodes, so no real image is needed. The defaults are plain EM, which starts from the probabilities of
    cosine prototypes at temperature 0.01; the scale was chosen on validation classes
    (`examples/studies/choose_heads.py`).

    Args:
        scale (`float`): the embeddings, of unit length, are multiplied by it.
        balance (`Sequence[float]`): weight of the logarithm of a class's share in each layer. 1 is EM; the larger,
            the more large classes attract.
        temperature (`Sequence[float]`): the scores of each layer are divided by it.

    Raises:
        ConfigError: `balance` and `temperature` of different lengths, or none.
    """

    name = "transductive_em"

    def __init__(
        self,
        scale: float = 10.0,
        balance: Sequence[float] = (1.0,) * LAYERS,
        temperature: Sequence[float] = (1.0,) * LAYERS,
    ):
        if len(balance) != len(temperature) or not len(balance):
            raise ConfigError(
                f"balance and temperature need one number for each layer, got {len(balance)} and {len(temperature)}."
            )
        self.scale, self.balance, self.temperature = float(scale), balance, temperature

    def parameters(self) -> dict[str, Any]:
        return {"scale": self.scale, "balance": self.balance, "temperature": self.temperature}

    def logits(self, features: torch.Tensor, prepared: Tensors) -> torch.Tensor:
        support, features = prepared["prototypes"], unit(features)
        shots = prepared["members"].sum(-2).unsqueeze(-1)  # (..., C, 1)
        means, shares = support, torch.full_like(shots.mT, 1 / support.shape[-2])  # (..., C, D), (..., 1, C)
        for balance, temperature in zip(self.balance, self.temperature, strict=True):
            distances = _distances(features, means)
            scores = (balance * shares.clamp_min(_SMALLEST_SHARE).log() - self.scale**2 / 2 * distances) / temperature
            assigned = scores.softmax(-1)  # (..., Q, C)
            shares = assigned.mean(-2, keepdim=True)
            means = (shots * support + assigned.mT @ features) / (shots + assigned.sum(-2).unsqueeze(-1))
        return scores


def _distances(features: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    """Squared, without the queries' own lengths, which are the same for all classes: (..., Q, C)."""
    return means.square().sum(-1).unsqueeze(-2) - 2 * features @ means.mT
