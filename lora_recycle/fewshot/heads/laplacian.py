"""LaplacianShot: near queries get the same class."""

from __future__ import annotations

import torch

from .base import Tensors, TransductiveHead, unit


ITERATIONS = 20


class LaplacianHead(TransductiveHead):
    """Soft assignment to the prototypes with a Laplacian term over the queries (LaplacianShot, arXiv 2006.15486).

    Each query's squared distances to the prototypes are weighed against the assignments of its nearest neighbours
    among the queries, and all assignments are updated at once by the paper's bound optimiser. Its rectification of
    the prototypes is left out. One query alone is classified by its nearest prototype.

    Args:
        neighbours (`int`): how many other queries each is tied to.
        smoothness (`float`): weight of the Laplacian term. Both defaults were chosen on validation classes
            (`examples/studies/choose_heads.py`).
    """

    name = "transductive_laplacian"

    def __init__(self, neighbours: int = 2, smoothness: float = 0.5):
        self.neighbours, self.smoothness = int(neighbours), float(smoothness)

    def logits(self, features: torch.Tensor, prepared: Tensors) -> torch.Tensor:
        features = unit(features)
        closeness = 2 * features @ prepared["prototypes"].mT  # minus the squared distance, up to a constant
        neighbours = self.smoothness * nearest_neighbours(features, self.neighbours)
        scores = closeness
        for _ in range(ITERATIONS):
            scores = closeness + neighbours @ scores.softmax(-1)
        return scores


def nearest_neighbours(features: torch.Tensor, number: int) -> torch.Tensor:
    """1 where column j is among the nearest of row i, itself not counted, else 0: (..., Q, D) to (..., Q, Q)."""
    similarity = features @ features.mT
    itself = torch.eye(similarity.shape[-1], dtype=torch.bool, device=features.device)
    nearest = similarity.masked_fill(itself, -torch.inf).topk(min(number, len(itself) - 1), dim=-1).indices
    return torch.zeros_like(similarity).scatter(-1, nearest, 1.0)
