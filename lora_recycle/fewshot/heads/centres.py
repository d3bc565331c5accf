"""Nearest class centre (prototypical networks, arXiv 1703.05175)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...errors import ConfigError
from ..prototypes import prepare_centres, prepared_logits
from .base import FewShotHead, Tensors


class ClassCentreHead(FewShotHead):
    """Nearest class centre by the metric that the meta-LoRA was trained with.

    Args:
        metric (`str`): `cosine` (similarity to the mean embedding) or `euclidean` (minus the distance to it).
        temperature (`float`): the scores are divided by it. [`fit_head`] learns it; it changes how sure the head is,
            never which class wins.
    """

    name = "class_centres"

    def __init__(self, metric: str = "cosine", temperature: float = 0.1):
        if metric not in ("cosine", "euclidean"):
            raise ConfigError(f"unknown metric {metric!r}; this version knows cosine and euclidean.")
        self.metric, self.temperature = metric, float(temperature)

    @classmethod
    def from_settings(cls, trained: Mapping[str, Any], parameters: Mapping[str, Any]) -> ClassCentreHead:
        return cls(**{**trained, **parameters})

    def parameters(self) -> dict[str, Any]:
        return {"temperature": self.temperature}

    def prepare(self, statistics: Tensors) -> Tensors:
        return {"centres": prepare_centres(self.centres(statistics), self.metric)}

    def logits(self, features: torch.Tensor, prepared: Tensors) -> torch.Tensor:
        return prepared_logits(features, prepared["centres"], self.metric, self.temperature)


class CosineCentreHead(ClassCentreHead):
    """Nearest class centre by cosine, whatever the meta-LoRA was trained with."""

    name = "cosine_centres"

    def __init__(self, temperature: float = 0.1):
        super().__init__("cosine", temperature)

    @classmethod
    def from_settings(cls, trained: Mapping[str, Any], parameters: Mapping[str, Any]) -> CosineCentreHead:
        return cls(**parameters)


class EuclideanCentreHead(ClassCentreHead):
    """Nearest class centre by Euclidean distance, whatever the meta-LoRA was trained with.

    Distances have the scale of the embeddings, so probabilities mean something after [`fit_head`] only.
    """

    name = "euclidean_centres"

    def __init__(self, temperature: float = 1.0):
        super().__init__("euclidean", temperature)

    @classmethod
    def from_settings(cls, trained: Mapping[str, Any], parameters: Mapping[str, Any]) -> EuclideanCentreHead:
        return cls(**parameters)
