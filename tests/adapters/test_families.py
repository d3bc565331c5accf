"""An adapter of every family and class, under the names of transformers 4 and 5, answers as it does in PEFT."""

import shutil

import pytest
import torch
from helpers_adapters import OLD_DINOV2, OLD_VIT, SIZES, TEXT, edit_config, edit_tensors, to_old_name
from helpers_tiny import shake, tiny_processor
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    SiglipConfig,
    SiglipForImageClassification,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
)

from lora_recycle.adapters.files import guess_generation
from lora_recycle.adapters.pull import pull_adapter
from lora_recycle.backbones.backbone import Backbone
from lora_recycle.errors import AdapterError
from lora_recycle.inversion.config import InversionConfig
from lora_recycle.inversion.inverter import LoRAInverter
from lora_recycle.pool.pool import AdapterPool


REGISTERS = {"num_register_tokens": 3}


def both(config):
    return config(vision_config=SIZES, text_config=TEXT, num_labels=3)


#: class, its config, where the image tower lies in it, names of transformers 4 (None: the same as now)
CLASSES = {
    "vit": (ViTForImageClassification, ViTConfig(**SIZES, num_labels=3), "vit", OLD_VIT),
    "deit": (DeiTForImageClassification, DeiTConfig(**SIZES, num_labels=3), "deit", OLD_VIT),
    "dinov2": (Dinov2ForImageClassification, Dinov2Config(**SIZES, num_labels=3), "dinov2", OLD_DINOV2),
    "registers": (
        Dinov2WithRegistersForImageClassification,
        Dinov2WithRegistersConfig(**SIZES, **REGISTERS, num_labels=3),
        "dinov2_with_registers",
        OLD_DINOV2,
    ),
    "clip": (CLIPForImageClassification, both(CLIPConfig), "vision_model", None),
    "clip_whole": (CLIPModel, both(CLIPConfig), "vision_model", None),
    "clip_projection": (CLIPVisionModelWithProjection, CLIPVisionConfig(**SIZES), "vision_model", None),
    "clip_vision": (CLIPVisionModel, CLIPVisionConfig(**SIZES), "", "vision_model."),
    "siglip": (SiglipForImageClassification, both(SiglipConfig), "vision_model", None),
    "siglip_whole": (SiglipModel, both(SiglipConfig), "vision_model", None),
    "siglip_vision": (SiglipVisionModel, SiglipVisionConfig(**SIZES), "", "vision_model."),
}
LINEAR = "q_proj|k_proj|v_proj|o_proj|out_proj|fc1|fc2"


def base_of(name):
    kind, config, tower, _ = CLASSES[name]
    torch.manual_seed(0)
    model = shake(kind(config))
    return model, model.get_submodule(tower)


def trained(wearing):
    """Move every number that trains."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in wearing.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return wearing.eval()


def write_adapter(folder, name):
    """A trained LoRA with a head where the class has one; returns the PEFT model."""
    model, _ = base_of(name)
    tower = r"(vision_model\.)?(encoder\.)?" if "whole" in name else r".*"
    head = {"modules_to_save": ["classifier"]} if hasattr(model, "classifier") else {}
    targets = rf"{tower}layers?\.\d+\..*({LINEAR})"
    wearing = get_peft_model(model, LoraConfig(r=3, target_modules=targets, rank_pattern={"fc1": 2}, **head))
    trained(wearing)
    wearing.save_pretrained(folder)
    return wearing


def make_generation_4(folder, name):
    old = CLASSES[name][3]
    if isinstance(old, str):
        prefix = "base_model.model."
        edit_tensors(folder, lambda ts: {k.replace(prefix, prefix + old): tensor for k, tensor in ts.items()})
        return
    layers = (".layers.", ".encoder.layer.") if old is OLD_VIT else ("", "")
    edit_tensors(folder, lambda ts: {to_old_name(key, old, layers): tensor for key, tensor in ts.items()})
    edit_config(folder, target_modules=["query", "key", "value", "dense"], rank_pattern={old.get("mlp.fc1", "fc1"): 2})


def answers(wearing, name, images):
    """What the family's own model says: logits where it has a head, else the pooled image."""
    if hasattr(wearing.get_base_model(), "classifier"):
        return wearing(pixel_values=images).logits
    return wearing.get_base_model().get_submodule(CLASSES[name][2])(pixel_values=images).pooler_output


def pooled_answers(pool, images):
    with pool.folded(0) as backbone:
        if pool[0].head is None:
            return backbone.features(images)
        return pool[0].logits(backbone, backbone(images)[0])


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CLASSES)
def test_an_adapter_answers_as_in_peft_under_the_names_of_both_generations(tmp_path, name):
    wearing = write_adapter(tmp_path / "five", name)
    images = torch.randn(2, 3, 32, 32)
    expected = answers(wearing, name, images)
    reloaded = PeftModel.from_pretrained(base_of(name)[0], tmp_path / "five").eval()
    torch.testing.assert_close(answers(reloaded, name, images), expected, rtol=0, atol=0)
    untrained = get_peft_model(base_of(name)[0], LoraConfig(target_modules=["fc1"]))
    assert (expected - answers(untrained, name, images)).abs().max() > 1e-2
    shutil.copytree(tmp_path / "five", tmp_path / "four")
    if CLASSES[name][3] is not None:
        make_generation_4(tmp_path / "four", name)
    for folder in ("five", "four"):
        backbone = Backbone(base_of(name)[1], tiny_processor(), name)
        pool = AdapterPool.from_pretrained(tmp_path / folder, backbone=backbone)
        torch.testing.assert_close(pooled_answers(pool, images), expected, rtol=1e-5, atol=1e-5)
        # where both generations give the same names, nothing tells which one it was
        known = None if CLASSES[name][3] is None else {"five": 5, "four": 4}[folder]
        assert pull_adapter(tmp_path / folder).generation == pool[0].info.generation == known
        assert all(len(a) == (2 if "fc1" in module else 3) for module, (_, a) in pool[0].factors.items())
        assert len(pool[0].factors) == 12


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_on_a_layer_that_is_never_called_changes_nothing_there(tmp_path, dora):
    """SigLIP's pooling head reads the weights of its `out_proj` itself, so PEFT's layer around it is never run."""
    wearing = trained(
        get_peft_model(base_of("siglip_vision")[0], LoraConfig(target_modules=["out_proj"], use_dora=dora))
    )
    wearing.save_pretrained(tmp_path)
    pool = AdapterPool.from_pretrained(
        tmp_path, backbone=Backbone(base_of("siglip_vision")[1], tiny_processor(), "siglip")
    )
    images = torch.randn(2, 3, 32, 32)
    expected = answers(wearing, "siglip_vision", images)
    torch.testing.assert_close(pooled_answers(pool, images), expected, rtol=1e-5, atol=1e-5)
    assert sorted(pool[0].factors) == [f"encoder.layers.{i}.self_attn.out_proj" for i in (0, 1)]


@pytest.mark.parametrize("name", ["dinov2", "clip", "siglip"])
def test_an_adapter_of_another_family_than_vit_is_inverted_with_pruning(tmp_path, name):
    write_adapter(tmp_path, name)
    pool = AdapterPool.from_pretrained(tmp_path, backbone=Backbone(base_of(name)[1], tiny_processor(), name))
    priors = {"tv": 0.1, "patch_entropy": 0.1}
    shard = LoRAInverter(
        pool, InversionConfig(iterations=3, images_per_class=2, keep_ratio=0.5, priors=priors)
    ).invert(0)
    assert shard.teacher_logits.isfinite().all() and shard.kept_tokens.shape == (6, 8)


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_the_text_tower_alone_says_so(tmp_path):
    model = base_of("clip_whole")[0]
    get_peft_model(model, LoraConfig(r=2, target_modules="text_model.*q_proj")).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="it changes the text tower alone"):
        AdapterPool.from_pretrained(tmp_path, backbone=Backbone(base_of("clip")[1], tiny_processor(), "clip"))


@pytest.mark.parametrize(
    ("key", "made_for", "generation"),
    [
        ("vision_model.encoder.layers.0.mlp.fc1", "CLIPVisionModel", 4),
        ("vision_model.encoder.layers.0.mlp.fc1", "SiglipVisionModel", 4),
        ("vision_model.encoder.layers.0.mlp.fc1", "CLIPForImageClassification", None),
        ("vision_model.encoder.layers.0.mlp.fc1", None, None),  # nothing says of which class
        ("encoder.layers.0.mlp.fc1", "CLIPVisionModel", 5),
        ("encoder.layers.0.mlp.fc1", None, 5),
        ("dinov2.encoder.layer.0.mlp.fc1", None, None),  # the only linear layers of DINOv2 that kept their names
        ("dinov2.encoder.layer.0.attention.q_proj", None, 5),
        ("encoder.layer.0.attention.attention.query", "Dinov2Model", 4),
        ("encoder.layer.0.intermediate.dense", "ViTModel", 4),
        ("layers.0.mlp.fc1", "ViTModel", 5),
    ],
)
def test_names_tell_the_generation_or_it_is_unknown(key, made_for, generation):
    config = {"auto_mapping": {"base_model_class": made_for}} if made_for else {"auto_mapping": None}
    keys = [f"base_model.model.{key}.lora_A.weight", "base_model.model.classifier.weight"]
    assert guess_generation(config, keys) == generation
