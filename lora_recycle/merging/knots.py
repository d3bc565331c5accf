"""KnOTS: TIES in a basis that all adapters share (arXiv 2410.19735)."""

from __future__ import annotations

import dataclasses

import torch

from ..pool.pool import AdapterPool
from .base import Changes, dense_changes, require_weight_changes
from .magnitude import keep_largest
from .ties import Ties, Votes


@dataclasses.dataclass
class Knots(Ties):
    """TIES where the entries of different adapters mean the same.

    For each layer the changes side by side, `[dW_1 ... dW_T] = U S [V_1 ... V_T]`, give one basis U for all of them,
    whatever their ranks; TIES runs on the coordinates `S V_t = U^T dW_t`, and U takes the result back. U comes from
    the sum of `dW_t dW_t^T`, so that neither the concatenation nor more than one change is held. Directions that no
    adapter uses are left out. Biases and norms have no such basis and are merged as they are.

    Args:
        density (`float`, *optional*, defaults to 0.2): share of each adapter's coordinates that survive the trimming.
        scale (`float`, *optional*, defaults to 0.7): chosen on validation classes, as in the paper (0.6 for its ViTs);
            `examples/studies/choose_scale.py`.
    """

    scale: float = dataclasses.field(default=0.7, kw_only=True)

    def changes(self, pool: AdapterPool) -> Changes:
        bases, votes = shared_bases(pool), Votes()
        for i in range(len(pool)):
            changes = dense_changes(pool[i], pool.backbone.device)
            votes.add(keep_largest({n: bases[n].T @ c if n in bases else c for n, c in changes.items()}, self.density))
        return {name: bases[name] @ c if name in bases else c for name, c in votes.elected().items()}


def shared_bases(pool: AdapterPool) -> Changes:
    """Left singular vectors of all changes of a layer side by side: `{module}.weight` to (out, k), k their joint rank.

    Raises:
        AdapterError: an adapter is no change of weights.
    """
    grams: Changes = {}
    for i in range(len(pool)):
        adapter = pool[i]
        require_weight_changes(adapter)
        for module, factors in adapter.factors.items():
            b, a = (factor.to(pool.backbone.device).double() for factor in factors)
            gram = b @ (a @ a.T) @ b.T
            name = f"{module}.weight"
            grams[name] = grams[name] + gram if name in grams else gram
    bases = {}
    for name, gram in grams.items():
        squares, vectors = torch.linalg.eigh(gram)
        used = squares > 1e-10 * squares[-1].clamp_min(1e-30)  # singular values down to 1e-5 of the largest
        bases[name] = vectors[:, used].float()
    return bases
