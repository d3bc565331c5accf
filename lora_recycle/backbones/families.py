"""Where each family of vision transformers keeps its parts, and what its image classification head reads."""

from __future__ import annotations

import dataclasses

from transformers import (
    CLIPVisionModel,
    DeiTModel,
    Dinov2Model,
    Dinov2WithRegistersModel,
    PreTrainedModel,
    SiglipVisionModel,
    ViTModel,
)


@dataclasses.dataclass(frozen=True)
class Family:
    """Where a model type keeps its parts, and what its image classification head reads."""

    layers: str
    norm: str
    #: what `...ForImageClassification` feeds its head: the CLS token, the mean patch, or both concatenated
    head_input: str = "cls"
    pre_norm: str | None = None
    #: the head of this family reads tokens before the final norm
    head_before_norm: bool = False
    #: what pools the patches of a family that has no CLS token
    pooler: str | None = None


FAMILIES = {
    "vit": Family("layers", "layernorm"),
    "deit": Family("layers", "layernorm"),
    "dinov2": Family("encoder.layer", "layernorm", head_input="cls+patches"),
    "dinov2_with_registers": Family("encoder.layer", "layernorm", head_input="cls+patches"),
    "clip_vision_model": Family(
        "encoder.layers", "post_layernorm", head_input="patches", pre_norm="pre_layrnorm", head_before_norm=True
    ),
    "siglip_vision_model": Family("encoder.layers", "post_layernorm", head_input="patches", pooler="head"),
}

#: The headless class of each.
TOWERS: dict[str, type[PreTrainedModel]] = {
    "vit": ViTModel,
    "deit": DeiTModel,
    "dinov2": Dinov2Model,
    "dinov2_with_registers": Dinov2WithRegistersModel,
    "clip_vision_model": CLIPVisionModel,
    "siglip_vision_model": SiglipVisionModel,
}
