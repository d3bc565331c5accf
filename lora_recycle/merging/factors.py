"""Low-rank changes applied beside the weights, not inside them: (B, A) on a module add x A^T B^T to its output."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from ..backbones.backbone import Backbone


#: From a module's input (..., in) to what multiplies each of its r directions: (..., r).
Gate = Callable[[torch.Tensor], torch.Tensor]


@contextlib.contextmanager
def worn_factors(
    backbone: Backbone,
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]],
    gates: dict[str, Gate] | None = None,
) -> Iterator[Backbone]:
    """The backbone with module to (B, A), (out, r) and (r, in), added to its linear layers. Its weights stay alone.

    No (out, in) change is formed: a token costs r (in + out) more multiplications in each such layer. Weights that
    cannot be changed (quantized, or shared with others) can wear an adapter only this way.

    Args:
        gates: module to a [`Gate`]; without one all directions are open.
    """
    handles = []
    try:
        for module, pair in factors.items():
            b, a = (factor.to(backbone.device, backbone.dtype) for factor in pair)
            hook = _adding(b, a, (gates or {}).get(module))
            handles.append(backbone.model.get_submodule(module).register_forward_hook(hook))
        yield backbone
    finally:
        for handle in handles:
            handle.remove()


def _adding(b: torch.Tensor, a: torch.Tensor, gate: Gate | None) -> Callable[..., torch.Tensor]:
    def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        inner = F.linear(args[0], a)
        return output + F.linear(inner if gate is None else inner * gate(args[0]), b)

    return hook
