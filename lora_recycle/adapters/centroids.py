"""Matrices as codes of a few centroids: k-means for one matrix, and alternately for the two of a low-rank product."""

from __future__ import annotations

import torch

from .low_rank import decompose


Coded = tuple[torch.Tensor, torch.Tensor]  # codes, of the shape of the matrix, and ascending centroids (2^bits,)

_USUAL = 20  # powers of two up to which numbers are taken as they are
_ITERATIONS = 50  # of k-means on sorted numbers
_ROUNDS = 10  # of the two factors; the error of the product falls by a tenth up to there, and little after


def fit_centroids(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Lloyd's k-means in one dimension from evenly spaced quantiles: any shape to (2^bits,), ascending, float32."""
    ordered = values.flatten().float().sort().values.double()
    sums = torch.cat([ordered.new_zeros(1), ordered.cumsum(0)])
    places = ((torch.arange(2**bits) + 0.5) / 2**bits * len(ordered)).long()
    centroids = ordered[places]
    for _ in range(_ITERATIONS):
        edges = torch.searchsorted(ordered, (centroids[1:] + centroids[:-1]) / 2)
        edges = torch.cat([edges.new_zeros(1), edges, edges.new_full((1,), len(ordered))])
        members = edges.diff()
        means = sums[edges].diff() / members.clamp_min(1)
        moved = torch.where(members > 0, means, centroids)  # a centroid without members stays
        if torch.equal(moved, centroids):
            break
        centroids = moved
    return centroids.float()


def nearest_codes(values: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Index of each value's nearest centroid, ascending ones: any shape to int64 of the same."""
    return torch.bucketize(values.float().contiguous(), (centroids[1:] + centroids[:-1]) / 2)


def coded(values: torch.Tensor, bits: int) -> Coded:
    """Codes and centroids of one matrix.

    The nearest centroids fall short of the values: at one bit of a normal distribution their product with the values
    is 0.64 of the values' own. They are scaled so that nothing is missing along the values; what is left is noise
    across.
    """
    values, exponent = _of_usual_size(values.float())
    codes, centroids = _nearest(values, bits)
    scale = _scale(values.square().sum(), (values * centroids[codes]).sum())
    return codes, _times_power_of_two(centroids * scale, exponent)


def coded_product(b: torch.Tensor, a: torch.Tensor, bits: int) -> tuple[Coded, Coded]:
    """Codes and centroids of B and A, of shapes (out, r) and (r, in), so that their product B A is kept.

    B R and R^-1 A have the same product. A random R after the one that balances the two spreads their numbers evenly,
    and so fits one set of centroids. Then each factor in turn is what suits the coded other best (least squares), and
    the product is scaled as in [`coded`].
    """
    (b, exponent_b), (a, exponent_a) = _of_usual_size(b.float()), _of_usual_size(a.float())
    b, a = _spread(b, a)
    codes_a, centroids_a = _nearest(a, bits)
    for _ in range(_ROUNDS):
        known = centroids_a[codes_a]
        codes_b, centroids_b = _nearest(_solve(known @ known.T, known @ a.T @ b.T).T, bits)
        known = centroids_b[codes_b]
        codes_a, centroids_a = _nearest(_solve(known.T @ known, known.T @ b @ a), bits)
    new_b, new_a = centroids_b[codes_b], centroids_a[codes_a]
    own = ((b.T @ b) * (a @ a.T)).sum()  # of B A with itself, and below with what it has become
    scale = _scale(own, ((b.T @ new_b) * (a @ new_a.T)).sum())
    parts = (codes_b, centroids_b * scale, exponent_b), (codes_a, centroids_a, exponent_a)
    coded_b, coded_a = ((codes, _times_power_of_two(centroids, exponent)) for codes, centroids, exponent in parts)
    return coded_b, coded_a


def _of_usual_size(values: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Numbers whose squares neither overflow nor vanish, and the power of two by which those given are larger."""
    exponent = int(values.abs().max().frexp().exponent)
    exponent = exponent if abs(exponent) > _USUAL else 0
    return _times_power_of_two(values, -exponent), exponent


def _times_power_of_two(values: torch.Tensor, exponent: int) -> torch.Tensor:
    return (values.double() * 2.0**exponent).float() if exponent else values


def _nearest(values: torch.Tensor, bits: int) -> Coded:
    centroids = fit_centroids(values, bits)
    return nearest_codes(values, centroids), centroids


def _scale(own: torch.Tensor, along: torch.Tensor) -> torch.Tensor:
    return torch.where(along > 0, own / along, 1.0)


def _spread(b: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    u, vh = decompose(b, a)
    turn, _ = torch.linalg.qr(torch.randn(len(a), len(vh), generator=torch.Generator().manual_seed(0)))
    return u @ turn.T, turn @ vh


def _solve(gram: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """X of gram X = target, where gram is symmetric and may lack rank."""
    ridge = 1e-6 * gram.diagonal().mean() + torch.finfo(gram.dtype).tiny
    return torch.linalg.solve(gram + ridge * torch.eye(len(gram)), target)
