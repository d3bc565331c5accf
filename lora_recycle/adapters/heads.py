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
        multi_label (`bool`): whether an image may show several classes, each with a probability of its own.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    multi_label: bool = False

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

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """What it was trained with, of logits (B, C) and classes (B,): cross-entropy; with several labels an image the
        binary one, of the class against all others, summed over classes."""
        if not self.multi_label:
            return F.cross_entropy(logits, labels)
        targets = F.one_hot(labels, logits.shape[1]).to(logits)
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1).mean()

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """(B, C): softmax, or with several labels an image each class's own."""
        return logits.sigmoid() if self.multi_label else logits.softmax(1)


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
            "names make one (class_names=..., --class-names); for any base model, labelled images do (support=..., "
            "--support)."
        )
    if head.in_features != head.width(backbone):
        return f"its head reads {head.in_features} features, {backbone.name} gives {head.width(backbone)}."
    return None
