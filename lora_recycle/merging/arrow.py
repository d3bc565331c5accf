"""Arrow: each token is routed to the adapters whose main input direction it points along (arXiv 2405.11157)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch

from ..adapters.low_rank import svd_of_product
from ..backbones.backbone import Backbone
from ..errors import ConfigError
from ..pool.pool import AdapterPool
from .base import MergingMethod, require_weight_changes
from .factors import Gate, worn_factors


@dataclasses.dataclass
class Arrow(MergingMethod):
    """Retrieval without a support set: in every layer, every token picks the adapters that answer to it.

    An adapter's prototype in a layer is the first right singular vector of its change, the input that it amplifies
    most. A token's score for it is |x . v|; the softmax over the `top_k` highest weighs the adapters' outputs. Nothing
    is learned, ranks and targets may differ, and one image is enough, because the tokens are the images' own. PEFT's
    Arrow is the same for adapters of equal rank and targets; it does not route others.

    Changes of biases and norms take no input and are left out. All adapters' factors are held, and each routed layer
    costs a token (in + out) multiplications for every rank of every adapter.

    Args:
        top_k (`int`, *optional*, defaults to 3): adapters that a token hears in a layer (PEFT's default; paper: 4).
        temperature (`float`, *optional*, defaults to 1.0): of the softmax.

    Raises:
        ConfigError: `top_k` below 1, or a temperature that is not positive.
    """

    top_k: int = 3
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.top_k < 1 or not self.temperature > 0:
            raise ConfigError(
                f"top_k must be at least 1 and temperature above 0, got {self.top_k} and {self.temperature}."
            )

    def networks(self, pool: AdapterPool) -> Iterator[AbstractContextManager[Backbone]]:
        parts: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for i in range(len(pool)):
            adapter = pool[i]
            require_weight_changes(adapter)
            for module, pair in adapter.factors.items():
                parts.setdefault(module, []).append(pair)
        factors = {m: (torch.cat([b for b, _ in own], 1), torch.cat([a for _, a in own])) for m, own in parts.items()}
        yield worn_factors(pool.backbone, factors, {m: self._gate(own, pool.backbone) for m, own in parts.items()})

    def _gate(self, pairs: list[tuple[torch.Tensor, torch.Tensor]], backbone: Backbone) -> Gate:
        prototypes = torch.stack([first_direction(b, a) for b, a in pairs]).to(backbone.device, backbone.dtype)
        ranks = torch.tensor([b.shape[1] for b, _ in pairs], device=backbone.device)
        total, top_k = int(ranks.sum()), min(self.top_k, len(pairs))

        def gate(x: torch.Tensor) -> torch.Tensor:
            scores = (x @ prototypes.T).abs() / self.temperature
            best, index = scores.topk(top_k, -1)
            shares = torch.zeros_like(scores).scatter(-1, index, best.softmax(-1))
            return shares.repeat_interleave(ranks, -1, output_size=total)

        return gate


def first_direction(b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """The first right singular vector of B A, up to its sign: (out, r), (r, in) to (in,). B A is not formed."""
    return svd_of_product(b.float(), a.float())[2][0]
