"""Heads from labelled images: the nearest prototype, as a linear layer."""

from __future__ import annotations

import dataclasses

import torch

from ..adapters.adapter import Adapter
from ..adapters.heads import Head
from ..adapters.stored import StoredAdapter
from ..backbones.backbone import Backbone
from ..fewshot.prototypes import class_prototypes
from ..images.labelled import LabelledImages
from ..runtime.files import tensors_sha256


def prototype_layer(read: torch.Tensor, labels: torch.Tensor, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The linear layer whose logits fall with the squared distance to each class's prototype, softly.

    Args:
        read (`torch.Tensor`): (N, D), what heads read of the images.
        labels (`torch.Tensor`): int64 (N,), values 0 to `classes` - 1, each present.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: weight (C, D) and bias (C,).
    """
    prototypes = class_prototypes(read, labels, classes)
    scale = 2.0 / (-0.5 * torch.cdist(read, prototypes).square()).std(1).mean()  # soft enough to learn from
    squares = prototypes.square().sum(1)
    return scale * (prototypes - prototypes.mean(0)), scale * 0.5 * (prototypes.mean(0).square().sum() - squares)


@torch.no_grad()
def head_inputs(backbone: Backbone, images: torch.Tensor, batch_size: int = 128) -> torch.Tensor:
    """What heads of this family read of images, float32 on the CPU: uint8 (N, 3, H, W) to (N, `head_size`)."""
    tokens = (backbone(backbone.normalize(part))[0] for part in images.split(batch_size))
    return torch.cat([backbone.pool_for_head(hidden).float().cpu() for hidden in tokens])


def with_fitted_head(
    adapter: Adapter | StoredAdapter, worn: Backbone, support: LabelledImages
) -> Adapter | StoredAdapter:
    """The adapter with a head for the classes of a few labelled images, as the backbone that wears it sees them."""
    weight, bias = prototype_layer(head_inputs(worn, support.pixels), support.labels, len(support.label_names))
    headed = adapter.with_head(Head(weight, bias))
    digest = tensors_sha256({"pixels": support.pixels, "labels": support.labels})
    headed.info = dataclasses.replace(headed.info, labels=tuple(support.label_names), support=digest)
    return headed
