"""A network that wears the weighted sum of a pool's adapters, with weights that may learn."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ..adapters.low_rank import truncate
from ..merging.base import require_weight_changes
from ..pool.pool import AdapterPool
from .base import TaskNetwork


#: From a module's path to the weight of each adapter there: (n,), or for each output of its own, (out, n).
Weights = Callable[[str], torch.Tensor]


class AdapterMixture(TaskNetwork):
    """The backbone with sum_t w_t dW_t in every layer. The backbone's own weights are not touched.

    The sum is of changes, not of factors, whose sum would be another thing. A layer's change is formed from the
    factors in each forward, so that memory is that of the factors.

    Args:
        pool: its adapters, cut to `rank`; changes of biases and norms are left out.
        members: which of them.
        weights: asked in every forward; what it gives may want gradients.
        parameters: what `weights` depends on.

    Raises:
        AdapterError: an adapter changes no weights.
    """

    def __init__(
        self,
        pool: AdapterPool,
        members: Sequence[int],
        weights: Weights,
        parameters: Iterable[torch.Tensor],
        rank: int = 16,
        last_layers: int | None = None,
    ):
        super().__init__(pool.backbone, parameters, last_layers, self._mixed)
        self.weights, self.modules = weights, stacked_factors(pool, members, rank)

    @contextlib.contextmanager
    def _mixed(self) -> Iterator[None]:
        handles = []
        try:
            for path, (b, a, owner) in self.modules.items():
                module = self.backbone.model.get_submodule(path)
                handles.append(module.register_forward_hook(self._adding(path, b, a, owner)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _adding(self, path: str, b: torch.Tensor, a: torch.Tensor, owner: torch.Tensor) -> Callable[..., torch.Tensor]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            return output + F.linear(args[0], (b * self.weights(path)[..., owner]) @ a)

        return hook


def stacked_factors(
    pool: AdapterPool, members: Sequence[int], rank: int
) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Module to all factors side by side, (out, R) and (R, in), and int64 (R,), the place in `members` of each."""
    parts_of: dict[str, list[tuple[int, torch.Tensor, torch.Tensor]]] = {}
    device, dtype = pool.backbone.device, pool.backbone.dtype
    for place, i in enumerate(members):
        adapter = pool[i]
        require_weight_changes(adapter)
        for module, (b, a) in adapter.factors.items():
            b, a = b.float(), a.float()
            parts_of.setdefault(module, []).append((place, *(truncate(b, a, rank) if b.shape[1] > rank else (b, a))))
    stacked = {}
    for module, parts in parts_of.items():
        owner = torch.cat([torch.full((b.shape[1],), place) for place, b, _ in parts])
        b, a = torch.cat([b for _, b, _ in parts], 1), torch.cat([a for _, _, a in parts])
        stacked[module] = (b.to(device, dtype), a.to(device, dtype), owner.to(device))
    return stacked
