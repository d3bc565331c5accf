"""Few-shot heads: what turns support features into class scores."""

from __future__ import annotations

import torch

from ..prototypes import centre_logits, prepare_centres, prepared_logits


class ClassCentreHead:
    """Nearest class centre.

    Args:
        metric (`str`): `cosine` (similarity to the mean embedding) or `euclidean` (minus the distance to it).
        temperature (`float`): the scores are divided by it.
    """

    def __init__(self, metric: str = "cosine", temperature: float = 0.1):
        self.metric, self.temperature = metric, temperature

    def logits(self, features: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
        """(Q, D), (C, D) to (Q, C)."""
        return centre_logits(features, centres, self.metric, self.temperature)

    def prepare(self, centres: torch.Tensor) -> torch.Tensor:
        """(C, D) to what `prepared_logits` compares with, (C, D), so that it is computed once for many queries."""
        return prepare_centres(centres, self.metric)

    def prepared_logits(self, features: torch.Tensor, prepared: torch.Tensor) -> torch.Tensor:
        """`logits` against centres from `prepare`."""
        return prepared_logits(features, prepared, self.metric, self.temperature)
