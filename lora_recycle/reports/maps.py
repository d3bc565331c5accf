"""2-D maps of embeddings: principal components, and how well classes stand apart in all dimensions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def principal_map(features: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The two principal components of embeddings of unit length.

    Args:
        features: (N, D), N at least 3.

    Returns:
        (N, 2) and the share of the variance that they show.
    """
    from sklearn.decomposition import PCA

    unit = F.normalize(features.float(), dim=-1).cpu().numpy()
    pca = PCA(n_components=2, svd_solver="full")
    return torch.from_numpy(pca.fit_transform(unit)).float(), float(pca.explained_variance_ratio_.sum())


def turned(points: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """A map turned or mirrored so that its points lie as near as can be to those of another: (N, 2), (N, 2)."""
    from scipy.linalg import orthogonal_procrustes

    rotation, _ = orthogonal_procrustes(points.numpy(), reference.numpy())
    return points @ torch.from_numpy(rotation).to(points)


def share_nearest_to_own(features: torch.Tensor, labels: Sequence[str]) -> float | None:
    """Share of the images nearest (cosine) to the prototype of their own class, which is made without them.

    Args:
        features: (N, D).
        labels: N class names. Classes of one image have prototypes, but their images are not counted.

    Returns:
        None where fewer than two classes, or no class of two images, leave nothing to measure.
    """
    names = sorted(set(labels))
    index = torch.tensor([names.index(label) for label in labels])
    members = F.one_hot(index, len(names)).float()  # (N, C)
    unit = F.normalize(features.float().cpu(), dim=-1)
    sums, counts = members.T @ unit, members.sum(0)
    similarity = unit @ F.normalize(sums, dim=-1).T
    own = F.normalize(sums[index] - unit, dim=-1)  # without the image itself
    similarity[torch.arange(len(unit)), index] = (unit * own).sum(-1)
    counted = counts[index] > 1
    if len(names) < 2 or not counted.any():
        return None
    return (similarity.argmax(1) == index)[counted].float().mean().item()


def share_same_neighbour(features: torch.Tensor, teacher: torch.Tensor) -> float:
    """Share of the images whose nearest other image (cosine) is the same for both: (N, D), (N, D'), N at least 2."""
    nearest = []
    for space in (features, teacher):
        unit = F.normalize(space.float().cpu(), dim=-1)
        nearest.append((unit @ unit.T).fill_diagonal_(-2.0).argmax(1))
    return (nearest[0] == nearest[1]).float().mean().item()
