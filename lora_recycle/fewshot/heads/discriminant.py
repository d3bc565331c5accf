"""Linear discriminant analysis with shrinkage, updated exactly (the head of First Session Adaptation)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ...errors import ConfigError
from .base import LinearHead, Tensors, unit, with_classes


#: Variance where no class has two images to show one: the scores of cosine prototypes at this temperature.
NO_VARIANCE = 0.1


class DiscriminantHead(LinearHead):
    """Gaussian classes of one covariance and equal priors, on embeddings of unit length.

    As in First Session Adaptation (arXiv 2303.13199) a support set is its class sums and one matrix pooled over all
    classes, so that classes and images can be added in any order with the same result. The matrix is the scatter
    within classes, not the raw second moment: the two say the same given the sums, but in float32 the second loses
    the small differences between large means.

    Args:
        shrinkage (`float`): share of the isotropic part in the covariance, more than 0 and at most 1, which makes it
            cosine prototypes. The default was chosen on validation classes (`examples/studies/choose_heads.py`).

    Raises:
        ConfigError: another shrinkage.
    """

    name = "lda"
    statistics_shapes = {"sums": "CD", "counts": "C", "scatter": "DD"}

    def __init__(self, shrinkage: float = 0.9):
        if not 0 < shrinkage <= 1:
            raise ConfigError(f"shrinkage must lie above 0 and be at most 1, got {shrinkage}.")
        self.shrinkage = shrinkage

    def statistics(self, features: torch.Tensor, labels: torch.Tensor, num_classes: int) -> Tensors:
        features = unit(features)
        known = super().statistics(features, labels, num_classes)
        members = F.one_hot(labels, num_classes).to(features.dtype)
        residuals = features - members @ self.prototypes(known)
        return {**known, "scatter": residuals.mT @ residuals}

    def merged(self, earlier: Tensors, later: Tensors) -> Tensors:
        """The scatter grows by how far the two means of each class lie apart (Chan, Golub & LeVeque, 1983)."""
        classes = len(later["counts"])
        earlier = {name: value.to(later[name]) for name, value in earlier.items()}
        known = {name: with_classes(earlier[name], classes) for name in ("sums", "counts")}
        total = {name: known[name] + later[name] for name in known}
        weight = known["counts"] * later["counts"] / total["counts"].clamp_min(1)
        apart = self.prototypes(known) - self.prototypes(later)
        between = (apart * weight[:, None]).T @ apart
        return {**total, "scatter": earlier["scatter"] + later["scatter"] + between}

    def prepare(self, statistics: Tensors) -> Tensors:
        prototypes, counts = self.prototypes(statistics), statistics["counts"]
        freedom = (counts.sum(-1) - counts.shape[-1]).clamp_min(1)
        covariance = statistics["scatter"] / freedom[..., None, None]
        weights = torch.cholesky_solve(prototypes.mT, torch.linalg.cholesky(shrunk(covariance, self.shrinkage)))
        return {"weights": weights, "bias": -0.5 * (prototypes.mT * weights).sum(-2, keepdim=True)}


def shrunk(covariance: torch.Tensor, shrinkage: float) -> torch.Tensor:
    """(1 - a) S + a (tr S / D) I: (..., D, D). Where S is 0, `NO_VARIANCE` takes the place of its mean variance."""
    variance = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    # rounding alone leaves about 1e-15 where every class has one image
    isotropic = torch.where(variance > 1e-12, shrinkage * variance, NO_VARIANCE)
    identity = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    return (1 - shrinkage) * covariance + isotropic * identity
