"""LaplacianShot: near queries get the same class."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .base import Tensors, TransductiveHead, unit


ITERATIONS = 20
TEMPERATURE = 0.1  # of the probabilities in the rectification


class LaplacianHead(TransductiveHead):
    """Soft assignment to the prototypes with a Laplacian term over the queries (LaplacianShot, arXiv 2006.15486).

    Each query's squared distances to the prototypes are weighed against the assignments of its nearest neighbours
    among the queries, and all assignments are updated at once by the paper's bound optimiser. The prototypes are
    rectified first ([`rectified`]), unless there are fewer queries than classes, whose mean says nothing. One query
    alone is classified by its nearest prototype.

    Args:
        neighbours (`int`): how many other queries each is tied to.
        smoothness (`float`): weight of the Laplacian term. Both defaults were chosen on validation classes
            (`examples/studies/choose_heads.py`).
        rectify (`bool`): whether the prototypes are rectified.
    """

    name = "transductive_laplacian"

    def __init__(self, neighbours: int = 2, smoothness: float = 0.5, rectify: bool = True):
        self.neighbours, self.smoothness, self.rectify = int(neighbours), float(smoothness), bool(rectify)

    def logits(self, features: torch.Tensor, prepared: Tensors) -> torch.Tensor:
        features, prototypes = unit(features), prepared["prototypes"]
        neighbours = self.smoothness * nearest_neighbours(features, self.neighbours)
        if self.rectify and features.shape[-2] >= prototypes.shape[-2]:
            features, prototypes = rectified(features, prepared)
        # minus the squared distance, up to the query's own length
        closeness = 2 * features @ prototypes.mT - prototypes.square().sum(-1).unsqueeze(-2)
        scores = closeness
        for _ in range(ITERATIONS):
            scores = closeness + neighbours @ scores.softmax(-1)
        return scores


def rectified(features: torch.Tensor, prepared: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries moved to where the support lies, and prototypes made of both, as in LaplacianShot's code.

    The queries are shifted so that their mean is that of the support images. Every image, query or support, belongs to
    the prototype nearest by cosine, and a new prototype is the mean of its images, each times its probability for the
    class (softmax over the classes, temperature 0.1). A prototype without images stays. BD-CSPN (arXiv 1911.10713),
    where the idea is from, divides by the sum of the weights instead of the number of images.

    Args:
        features: unit length, (..., Q, D).

    Returns:
        (..., Q, D) and (..., C, D).
    """
    support, prototypes = prepared["support"], prepared["prototypes"]
    features = features + (support.mean(-2, keepdim=True) - features.mean(-2, keepdim=True))
    images = torch.cat([support, features], -2)
    similarity = unit(images) @ unit(prototypes).mT  # (..., N + Q, C)
    chosen = F.one_hot(similarity.argmax(-1), similarity.shape[-1]).to(similarity.dtype)
    counts = chosen.sum(-2)[..., None]
    means = (chosen * (similarity / TEMPERATURE).softmax(-1)).mT @ images / counts.clamp_min(1)
    return features, torch.where(counts > 0, means, prototypes)


def nearest_neighbours(features: torch.Tensor, number: int) -> torch.Tensor:
    """1 where column j is among the nearest of row i, itself not counted, else 0: (..., Q, D) to (..., Q, Q)."""
    similarity = features @ features.mT
    itself = torch.eye(similarity.shape[-1], dtype=torch.bool, device=features.device)
    nearest = similarity.masked_fill(itself, -torch.inf).topk(min(number, len(itself) - 1), dim=-1).indices
    return torch.zeros_like(similarity).scatter(-1, nearest, 1.0)
