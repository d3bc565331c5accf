"""Regularised logistic regression (scikit-learn) on the support embeddings."""

from __future__ import annotations

import torch

from .base import ImagesHead, LinearHead, Tensors


class LogisticRegressionHead(ImagesHead, LinearHead):
    """Multinomial logistic regression with an L2 penalty on embeddings of unit length.

    The penalty is scikit-learn's default, `C=1`, as in "Rethinking Few-Shot Image Classification" (arXiv 2003.11539).
    It has no sufficient statistics: a fitted task keeps all support embeddings, and more images mean a new fit, to
    the same result as all at once. The fit happens outside autograd: gradients reach the queries, not the support.
    """

    name = "logistic_regression"

    def prepare(self, statistics: Tensors) -> Tensors:
        features, labels = statistics["features"], statistics["labels"]
        batch = features.shape[:-2]
        tasks = [(features.detach(), labels)]
        if batch:
            tasks = list(zip(features.detach().flatten(0, -3), labels.flatten(0, -2), strict=True))
        fits = [_fit(*task) for task in tasks]
        weights, bias = (torch.stack(part).to(features) for part in zip(*fits, strict=True))
        return {"weights": weights.view(*batch, *weights.shape[1:]), "bias": bias.view(*batch, *bias.shape[1:])}


def _fit(features: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, D), int64 (N,) to weights (D, C) and bias (1, C)."""
    from sklearn.linear_model import LogisticRegression  # slow to import, and most heads do without

    model = LogisticRegression(C=1.0, max_iter=1000).fit(features.cpu().numpy(), labels.cpu().numpy())
    weights, bias = torch.from_numpy(model.coef_).T, torch.from_numpy(model.intercept_)[None]
    if len(model.classes_) == 2:  # scikit-learn gives the second class's score against the first
        weights, bias = (torch.cat([torch.zeros_like(part), part], 1) for part in (weights, bias))
    return weights, bias
