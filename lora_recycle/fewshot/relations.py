"""What a network says about images without labels: how similar it finds them to each other."""

from __future__ import annotations

import torch
import torch.nn.functional as F


#: Columns that teachers' features are compressed to.
MOST_DIRECTIONS = 1024


def relational_divergence(student: torch.Tensor, teacher: torch.Tensor, scale: float = 15.0) -> torch.Tensor:
    """KL of the student's similarities between the images of a batch to the teacher's, mean over images.

    Each image's softmax of `scale` x cosine similarity runs over all other images of the batch. `teacher` may be a
    concatenation of several teachers' unit features, each divided by the root of their number: the inner product is
    then the mean of their cosine similarities.

    Args:
        student: features (B, D).
        teacher: features (B, D'), normalised here.
    """
    return relational_divergence_to(student, cosine_similarity(teacher.float()), scale)


def relational_divergence_to(student: torch.Tensor, similarity: torch.Tensor, scale: float = 15.0) -> torch.Tensor:
    """The same against a given (B, B) matrix of teacher similarities."""
    others = ~torch.eye(len(student), dtype=torch.bool, device=student.device)
    size = (len(student), len(student) - 1)
    target = (scale * similarity.to(student.device)[others].view(size)).log_softmax(-1)
    output = (scale * cosine_similarity(student.float())[others].view(size)).log_softmax(-1)
    return F.kl_div(output, target, log_target=True, reduction="batchmean")


def cosine_similarity(features: torch.Tensor) -> torch.Tensor:
    """(B, D) to (B, B)."""
    unit = F.normalize(features, dim=-1)
    return unit @ unit.T


def principal_directions(features: torch.Tensor, dim: int = MOST_DIRECTIONS, seed: int = 0) -> torch.Tensor | None:
    """Directions on which `features` keep nearly the same inner products with fewer columns (truncated SVD).

    Args:
        features: (N, C), all rows or a sample of them.

    Returns:
        (C, dim), or None where C columns or N rows are not more than `dim`: nothing to gain.
    """
    if min(features.shape) <= dim:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.svd_lowrank(features.float(), q=dim, niter=2)[2]
