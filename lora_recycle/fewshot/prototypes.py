"""Prototypes (prototypical networks, arXiv 1703.05175), for training and for use."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def class_prototypes(features: torch.Tensor, labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Mean embedding of each class: (N, D), int64 (N,) to (C, D)."""
    sums = features.new_zeros(num_classes, features.shape[1]).index_add_(0, labels, features)
    return sums / torch.bincount(labels, minlength=num_classes).to(features)[:, None].clamp_min(1)


def prototype_logits(
    features: torch.Tensor, prototypes: torch.Tensor, metric: str = "cosine", temperature: float = 1.0
) -> torch.Tensor:
    """Scores of embeddings against prototypes: (Q, D), (C, D) to (Q, C).

    Euclidean: minus the distance, not squared (Eq. 3 of LoRA Recycle). Cosine: the cosine similarity.
    """
    return prepared_logits(features, prepare_prototypes(prototypes, metric), metric, temperature)


def prepare_prototypes(prototypes: torch.Tensor, metric: str) -> torch.Tensor:
    """What of `prototype_logits` does not change from query to query: the prototypes, for cosine of unit length."""
    return prototypes if metric == "euclidean" else F.normalize(prototypes, dim=-1)


def prepared_logits(features: torch.Tensor, prepared: torch.Tensor, metric: str, temperature: float) -> torch.Tensor:
    """`prototype_logits` with prototypes from `prepare_prototypes`."""
    if metric == "euclidean":
        # directly, whatever the number of queries: the other way is less exact, and export cannot choose by the batch
        return -torch.cdist(features, prepared, compute_mode="donot_use_mm_for_euclid_dist") / temperature
    # what F.normalize computes, without the third of all that `predict` adds to a forward that its Python took
    lengths = torch.linalg.vector_norm(features, dim=-1, keepdim=True).clamp_min(1e-12)
    return features / lengths @ prepared.mT / temperature
