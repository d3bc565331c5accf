"""The module names of a saved LoRA: all of the headless backbone's that it changes, none of a classifier's."""

import re

import peft
import pytest
from helpers_adapters import SIZES, TEXT
from transformers import (
    AutoModelForImageClassification,
    CLIPConfig,
    CLIPVisionConfig,
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    SiglipConfig,
    SiglipVisionConfig,
    ViTConfig,
)

from lora_recycle.backbones.families import TOWERS
from lora_recycle.modeling.serialization import _targets


#: The config of the tower, and that of its classifier where it is another.
CONFIGS = {
    "vit": (ViTConfig(**SIZES),),
    "deit": (DeiTConfig(**SIZES, architectures=["DeiTForImageClassification"]),),
    "dinov2": (Dinov2Config(**SIZES),),
    "dinov2_with_registers": (Dinov2WithRegistersConfig(**SIZES),),
    "clip_vision_model": (CLIPVisionConfig(**SIZES), CLIPConfig(vision_config=SIZES, text_config=TEXT)),
    "siglip_vision_model": (SiglipVisionConfig(**SIZES), SiglipConfig(vision_config=SIZES, text_config=TEXT)),
}


def matched(pattern, model):
    return {name for name, _ in model.named_modules() if re.fullmatch(pattern, name)}


@pytest.mark.parametrize("family", TOWERS)
def test_only_the_headless_backbone_has_the_names(family):
    tower, leaves = TOWERS[family](CONFIGS[family][0]), ["q_proj", "k_proj", "v_proj", "fc1", "fc2"]
    wanted = {
        name for name, _ in tower.named_modules() if name.rpartition(".")[2] in leaves and ".layer" in f".{name}"
    }
    wrapped = peft.get_peft_model(tower, peft.LoraConfig(r=2, target_modules=sorted(wanted)))
    pattern = _targets(wrapped)
    assert matched(pattern, tower) == wanted and len(wanted) >= 2 * len(leaves) and r"\d+" in pattern
    again = peft.get_peft_model(TOWERS[family](CONFIGS[family][0]), peft.LoraConfig(r=2, target_modules=pattern))
    assert set(again.base_model.targeted_module_names) == wanted
    classifier = AutoModelForImageClassification.from_config(CONFIGS[family][-1])
    assert not matched(pattern, classifier)


def test_layers_that_are_not_changed_are_not_named():
    wrapped = peft.get_peft_model(
        TOWERS["vit"](CONFIGS["vit"][0]), peft.LoraConfig(r=2, target_modules=["layers.0.mlp.fc1", "q_proj"])
    )
    pattern = _targets(wrapped)
    names = set(wrapped.base_model.targeted_module_names)
    assert "layers.1.mlp.fc1" not in names and matched(pattern, wrapped.get_base_model()) == names


def test_other_types_keep_their_list():
    wrapped = peft.get_peft_model(
        TOWERS["vit"](CONFIGS["vit"][0]), peft.LoHaConfig(r=2, target_modules={"v_proj", "q_proj"})
    )
    assert _targets(wrapped) == ["q_proj", "v_proj"]
