"""A control: adapters whose weight changes are random, of the norms of others."""

from __future__ import annotations

import dataclasses

import torch

from ..adapters.adapter import Adapter
from ..adapters.pull import AdapterInfo
from ..adapters.stored import StoredAdapter
from ..backbones.backbone import Backbone


@dataclasses.dataclass
class RandomizedAdapter:
    """A random adapter of the norms of `source`, drawn again from the generator's `state` whenever it is asked for."""

    source: Adapter | StoredAdapter | RandomizedAdapter
    state: torch.Tensor

    @property
    def info(self) -> AdapterInfo:
        return self.source.info

    @property
    def headless(self) -> bool:
        return self.source.headless

    def require_head(self, backbone: Backbone) -> None:
        self.source.require_head(backbone)

    def load(self) -> Adapter:
        generator = torch.Generator()
        generator.set_state(self.state)
        return randomize(self.source.load(), generator)


def randomize(adapter: Adapter, generator: torch.Generator) -> Adapter:
    """Every weight change replaced by a random one of the same rank, 16 at most, and Frobenius norm."""
    factors = {}
    for module, (b, a) in adapter.factors.items():
        rank = min(b.shape[1], 16)
        new_b = torch.randn(b.shape[0], rank, generator=generator)
        new_a = torch.randn(rank, a.shape[1], generator=generator)
        scale = torch.linalg.norm(b @ a) / torch.linalg.norm(new_b @ new_a)
        factors[module] = (new_b * scale, new_a)
    return dataclasses.replace(adapter, factors=factors, vector_deltas={}, peft_layers={})
