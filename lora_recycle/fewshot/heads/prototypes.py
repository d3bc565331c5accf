"""Nearest prototype (prototypical networks, arXiv 1703.05175)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...errors import ConfigError
from ..prototypes import prepare_prototypes, prepared_logits
from .base import FewShotHead, Tensors


class PrototypeHead(FewShotHead):
    """Nearest prototype by the metric that the meta-LoRA was trained with.

    Args:
        metric (`str`): `cosine` (similarity to the mean embedding) or `euclidean` (minus the distance to it).
        temperature (`float`): the scores are divided by it. [`fit_head`] learns it; it changes how sure the head is,
            never which class wins.
    """

    name = "prototypes"

    def __init__(self, metric: str = "cosine", temperature: float = 0.1):
        if metric not in ("cosine", "euclidean"):
            raise ConfigError(f"unknown metric {metric!r}; this version knows cosine and euclidean.")
        self.metric, self.temperature = metric, float(temperature)

    @classmethod
    def from_settings(cls, trained: Mapping[str, Any], parameters: Mapping[str, Any]) -> PrototypeHead:
        return cls(**{**trained, **parameters})

    def parameters(self) -> dict[str, Any]:
        return {"temperature": self.temperature}

    def prepare(self, statistics: Tensors) -> Tensors:
        return {"prototypes": prepare_prototypes(self.prototypes(statistics), self.metric)}

    def logits(self, features: torch.Tensor, prepared: Tensors) -> torch.Tensor:
        return prepared_logits(features, prepared["prototypes"], self.metric, self.temperature)


class CosinePrototypeHead(PrototypeHead):
    """Nearest prototype by cosine, whatever the meta-LoRA was trained with."""

    name = "cosine_prototypes"

    def __init__(self, temperature: float = 0.1):
        super().__init__("cosine", temperature)

    @classmethod
    def from_settings(cls, trained: Mapping[str, Any], parameters: Mapping[str, Any]) -> CosinePrototypeHead:
        return cls(**parameters)


class EuclideanPrototypeHead(PrototypeHead):
    """Nearest prototype by Euclidean distance, whatever the meta-LoRA was trained with.

    Distances have the scale of the embeddings, so probabilities mean something after [`fit_head`] only.
    """

    name = "euclidean_prototypes"

    def __init__(self, temperature: float = 1.0):
        super().__init__("euclidean", temperature)

    @classmethod
    def from_settings(cls, trained: Mapping[str, Any], parameters: Mapping[str, Any]) -> EuclideanPrototypeHead:
        return cls(**parameters)
