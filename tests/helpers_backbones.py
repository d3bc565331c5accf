"""A tiny model of each family, as transformers builds it."""

import copy

import torch
from helpers_tiny import SIZES, shake
from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    SiglipConfig,
    SiglipForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)


TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
#: class, config, where the base model lies, tokens before the patches
FAMILIES = {
    "vit": (ViTForImageClassification, ViTConfig(**SIZES, num_labels=5), "vit", 1),
    "deit": (DeiTForImageClassification, DeiTConfig(**SIZES, num_labels=5), "deit", 2),
    "dinov2": (Dinov2ForImageClassification, Dinov2Config(**SIZES, num_labels=5), "dinov2", 1),
    "registers": (
        Dinov2WithRegistersForImageClassification,
        Dinov2WithRegistersConfig(**SIZES, num_labels=5, num_register_tokens=3),
        "dinov2_with_registers",
        4,
    ),
    "clip": (
        CLIPForImageClassification,
        CLIPConfig(vision_config=SIZES, text_config=TEXT, num_labels=5),
        "vision_model",
        1,
    ),
    "siglip": (
        SiglipForImageClassification,
        SiglipConfig(vision_config=SIZES, text_config=TEXT, num_labels=5),
        "vision_model",
        0,
    ),
}


def build(family, layers=2):
    kind, config, base, prefix = FAMILIES[family]
    torch.manual_seed(0)
    config = copy.deepcopy(config)  # models keep it, and their choice of attention in it
    getattr(config, "vision_config", config).num_hidden_layers = layers
    model = shake(kind(config))
    return model, getattr(model, base), prefix
