"""Heads of adapters: what turns the tokens of an image into class scores, each knowing what it reads of them."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F

from ..backbones.backbone import Backbone


@dataclasses.dataclass(frozen=True, eq=False)
class Head:
    """A linear layer on what the family's `...ForImageClassification` feeds its classifier.

    Args:
        weight (`Tensor`): (C, D).
        bias (`Tensor`, *optional*): (C,).
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None

    @property
    def prompt(self) -> str | None:
        """What class names were put into, for a head that was made of them."""
        return None

    @property
    def in_features(self) -> int:
        """Width of what it reads."""
        return self.weight.shape[1]

    def width(self, backbone: Backbone) -> int:
        """Width of what `backbone` gives it to read."""
        return backbone.head_size

    def read(self, backbone: Backbone, hidden: torch.Tensor) -> torch.Tensor:
        """(B, T, D), tokens after the last layer, to what the linear layer takes."""
        return backbone.pool_for_head(hidden)

    def logits(self, backbone: Backbone, hidden: torch.Tensor) -> torch.Tensor:
        """(B, T, D), tokens after the last layer, to (B, C)."""
        features = self.read(backbone, hidden)
        return F.linear(features, self.weight.to(features), None if self.bias is None else self.bias.to(features))


@dataclasses.dataclass(frozen=True, eq=False)
class PooledHead(Head):
    """A linear layer on the image's feature ([`Backbone.pool_features`]): for CLIP the normed CLS token."""

    def width(self, backbone: Backbone) -> int:
        return backbone.hidden_size

    def read(self, backbone: Backbone, hidden: torch.Tensor) -> torch.Tensor:
        return backbone.pool_features(hidden)


@dataclasses.dataclass(frozen=True, eq=False)
class TextHead(PooledHead):
    """Zero-shot classification: the scaled cosine between the image's feature and the texts of the classes.

    Args:
        weight (`Tensor`): (C, P), text embeddings of length 1 times the model's logit scale.
        bias (`Tensor`, *optional*): (C,), SigLIP's logit bias.
        projection (`Tensor`, *optional*): (P, D), CLIP's visual projection; SigLIP has none, P = D.
        prompt (`str`): what the class names were put into.
    """

    projection: torch.Tensor | None = None
    prompt: str = ""

    @property
    def in_features(self) -> int:
        return (self.weight if self.projection is None else self.projection).shape[1]

    def read(self, backbone: Backbone, hidden: torch.Tensor) -> torch.Tensor:
        features = backbone.pool_features(hidden)
        if self.projection is not None:
            features = F.linear(features, self.projection.to(features))
        return F.normalize(features, dim=-1)


def head_problem(head: Head | None, backbone: Backbone) -> str | None:
    """Why an adapter on `backbone` cannot be inverted through this head; None where it can."""
    if head is None:
        return (
            "has no classification head, so it cannot be inverted. Where the base model is CLIP or SigLIP, class "
            "names make one (class_names=..., --class-names)."
        )
    if head.in_features != head.width(backbone):
        return f"its head reads {head.in_features} features, {backbone.name} gives {head.width(backbone)}."
    return None
