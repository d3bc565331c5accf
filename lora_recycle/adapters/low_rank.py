"""The best approximation of a product of two factors at a lower rank."""

from __future__ import annotations

import torch


def truncate(b: torch.Tensor, a: torch.Tensor, rank: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The best approximation of B A at `rank` (Eckart-Young), both factors carrying the root of the spectrum."""
    return cut(*decompose(b, a), rank)


def decompose(b: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """B A as factors that are its singular vectors, largest first, each times the root of its singular value."""
    return as_factors(*svd_of_product(b, a))


def svd_of_product(b: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The thin SVD U, S, V^T of B A, which is formed only where that is the smaller computation."""
    if b.shape[1] < min(b.shape[0], a.shape[1]):
        q_b, r_b = torch.linalg.qr(b)
        q_a, r_a = torch.linalg.qr(a.T)
        u, s, vh = torch.linalg.svd(r_b @ r_a.T)
        return q_b @ u, s, vh @ q_a.T
    return torch.linalg.svd(b @ a, full_matrices=False)


def cut(b: torch.Tensor, a: torch.Tensor, rank: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    return b[:, :rank].clone(), a[:rank].clone()  # the rest is let go


def as_factors(u: torch.Tensor, s: torch.Tensor, vh: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return u[:, : len(s)] * s.sqrt(), s.sqrt()[:, None] * vh[: len(s)]
