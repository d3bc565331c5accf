"""An adapter as what it does to the backbone: changes of weights, or where it has none, PEFT's layers themselves."""

from __future__ import annotations

import dataclasses
from typing import TypeAlias

import torch

from ..backbones.backbone import Backbone
from ..errors import AdapterError
from .heads import Head, head_problem
from .peft_wrap import Layers
from .pull import AdapterInfo


#: Module to (B, A), shapes (out, r) and (r, in).
Factors: TypeAlias = dict[str, tuple[torch.Tensor, torch.Tensor]]


@dataclasses.dataclass
class Adapter:
    """One adapter as changes of the backbone's weights, with its head.

    `factors` maps a module to (B, A) with delta W = B A, shapes (out, r) and (r, in). A change of full rank, from an
    adapter that is no plain LoRA or from a whole checkpoint, has r = min(out, in), and A or B, the smaller one, is the
    identity. `vector_deltas` maps a parameter that no linear layer multiplies with (bias, norm, embedding) to its
    change. `peft_layers` maps a module to the PEFT layer that stands in for it, for types that compute with their
    input (Lily, Poly) and so are no change of weights; `factors` and `vector_deltas` are empty then.
    """

    info: AdapterInfo
    factors: Factors
    vector_deltas: dict[str, torch.Tensor]
    head: Head | None = None
    peft_layers: Layers = dataclasses.field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        return 0 if self.head is None else len(self.head.weight)

    def label(self, index: int) -> str:
        return self.info.labels[index] if self.info.labels else f"class {index}"

    def load(self) -> Adapter:
        """Itself: an adapter that is in memory already takes the place of a [`StoredAdapter`]."""
        return self

    def logits(self, backbone: Backbone, hidden: torch.Tensor) -> torch.Tensor:
        """(B, T, D), the tokens that `backbone` wearing this adapter gives, to (B, C) through the adapter's head."""
        return self.own_head().logits(backbone, hidden)

    def own_head(self) -> Head:
        """The head. Raises `AdapterError` where there is none."""
        if self.head is None:
            raise AdapterError(f"{self.info.name}: has no classification head, so it cannot say what an image shows.")
        return self.head

    @property
    def headless(self) -> bool:
        return self.head is None

    def with_head(self, head: Head) -> Adapter:
        return dataclasses.replace(self, head=head, info=dataclasses.replace(self.info, prompt=head.prompt))

    def require_head(self, backbone: Backbone) -> None:
        """Raise `AdapterError` where there is no head, or one that reads another width than `backbone` gives it."""
        if problem := head_problem(self.head, backbone):
            raise AdapterError(f"{self.info.where}: {problem}")
