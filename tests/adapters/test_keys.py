import pytest
import torch
from helpers_adapters import ALL_LINEAR, OLD_DINOV2, OLD_VIT, SIZES, to_old_name
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    CLIPVisionConfig,
    CLIPVisionModel,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    Dinov2WithRegistersModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from lora_recycle.adapters.keys import leaf_modules, module_of, rebuild_config, to_backbone_keys
from lora_recycle.errors import AdapterError


VIT = (OLD_VIT, (".layers.", ".encoder.layer."))
DINOV2 = (OLD_DINOV2, ("", ""))
FAMILIES = {
    "vit": (ViTConfig, ViTModel, ViTForImageClassification, VIT),
    "deit": (DeiTConfig, DeiTModel, DeiTForImageClassification, VIT),
    "dinov2": (Dinov2Config, Dinov2Model, Dinov2ForImageClassification, DINOV2),
    "registers": (
        Dinov2WithRegistersConfig,
        Dinov2WithRegistersModel,
        Dinov2WithRegistersForImageClassification,
        DINOV2,
    ),
}
TARGETS = [*ALL_LINEAR, "out_proj"]


def build(kind, config):
    with torch.device("meta"):
        return kind(config)


def keys_of(model):
    """Keys of a LoRA on every linear layer of each block."""
    wearing = get_peft_model(model, LoraConfig(r=2, target_modules=rf".*layers?\.\d+\..*({'|'.join(TARGETS)})"))
    return list(get_peft_model_state_dict(wearing))


@pytest.fixture(params=FAMILIES)
def family(request):
    config, bare, classifier, old = FAMILIES[request.param]
    return config(**SIZES, num_labels=3), bare, classifier, old


@pytest.mark.parametrize("saved_from", ["bare", "classifier"])
@pytest.mark.parametrize("generation", [4, 5])
def test_every_class_and_generation_ends_on_the_headless_model(family, saved_from, generation):
    config, bare, classifier, (names, layers) = family
    expected = keys_of(build(bare, config))
    keys = expected if saved_from == "bare" else keys_of(build(classifier, config))
    if generation == 4:
        keys = [to_old_name(key, names, layers) for key in keys]
        assert not set(keys) & {key for key in expected if "q_proj" in key}
    renamed, converted = to_backbone_keys(keys, build(bare, config))
    assert list(renamed) == keys
    assert list(renamed.values()) == expected
    assert converted == (generation == 4)
    assert len(expected) == 2 * 2 * 6  # A and B, two layers, six linear layers


def test_clip_prefix_of_the_classifier_and_of_transformers_4_is_stripped():
    model = build(CLIPVisionModel, CLIPVisionConfig(**SIZES))
    expected = keys_of(build(CLIPVisionModel, CLIPVisionConfig(**SIZES)))
    config = CLIPConfig(vision_config=SIZES, text_config={"num_hidden_layers": 1, "hidden_size": 32, "vocab_size": 9})
    prefixed = keys_of(build(CLIPForImageClassification, config))
    assert prefixed[0].startswith("base_model.model.vision_model.")
    renamed, converted = to_backbone_keys(prefixed, model)
    assert (list(renamed.values()), converted) == (expected, False)
    assert to_backbone_keys(expected, model)[0] == dict(zip(expected, expected, strict=True))


@pytest.mark.parametrize(
    "parameter",
    [
        "lora_A.weight",
        "lora_magnitude_vector",
        "lora_magnitude_vector.weight",
        "hada_w1_a",
        "lokr_w1",
        "ia3_l",
        "oft_R.weight",
    ],
)
def test_parameter_names_do_not_matter(parameter):
    model = build(ViTModel, ViTConfig(**SIZES))
    key = f"base_model.model.vit.encoder.layer.1.attention.attention.value.{parameter}"
    renamed, converted = to_backbone_keys([key], model)
    assert renamed == {key: f"base_model.model.layers.1.attention.v_proj.{parameter}"}
    assert converted


@pytest.mark.parametrize(
    "path", ["text_model.encoder.layers.0.mlp.fc1", "layers.7.mlp.fc1", "layers.0.mlp", "layers.0.attention.query_key"]
)
def test_a_key_that_ends_nowhere_is_named(path):
    key = f"base_model.model.{path}.lora_A.weight"
    with pytest.raises(AdapterError, match=key):
        to_backbone_keys([key], build(ViTModel, ViTConfig(**SIZES)))


def test_the_same_tensor_under_two_names_is_refused():
    keys = [f"base_model.model.{p}layers.0.mlp.fc1.lora_A.weight" for p in ("", "vit.")]
    with pytest.raises(AdapterError, match=r"layers\.0\.mlp\.fc1\.lora_A\.weight: .*twice"):
        to_backbone_keys(keys, build(ViTModel, ViTConfig(**SIZES)))


def test_leaf_modules_are_what_adapters_wrap():
    leaves = leaf_modules(build(ViTModel, ViTConfig(**SIZES)))
    assert {"layers.0.mlp.fc1", "layernorm", "embeddings.patch_embeddings.projection"} <= leaves
    assert not leaves & {"", "layers", "embeddings", "layers.0.mlp.activation_fn"}
    assert module_of("base_model.model.layers.0.mlp.fc1.lora_A.weight", leaves) == "layers.0.mlp.fc1"
    assert module_of("layers.0.mlp.fc1", leaves) is None  # a module's path alone names no parameter


def test_rebuild_config_moves_patterns_and_feedforward_to_live_paths():
    model = build(ViTModel, ViTConfig(**SIZES))
    old = [f"base_model.model.vit.encoder.layer.{i}.attention.attention.query.lora_A.weight" for i in range(2)]
    names, _ = to_backbone_keys(old, model)
    config = {
        "peft_type": "LORA",
        "target_modules": ["query"],
        "rank_pattern": {r"layer\.1\.attention\.attention\.query": 2},
        "layers_to_transform": [0, 1],
        "modules_to_save": ["classifier"],
        "auto_mapping": {"base_model_class": "Evil"},
        "megatron_config": {"a": 1},
    }
    rebuilt = rebuild_config(config, names, model)
    assert rebuilt.target_modules == {"layers.0.attention.q_proj", "layers.1.attention.q_proj"}
    assert rebuilt.rank_pattern == {"layers.1.attention.q_proj": 2}
    assert rebuilt.modules_to_save is rebuilt.layers_to_transform is rebuilt.megatron_config is None


@pytest.mark.parametrize(
    "change",
    [{"init_lora_weights": "pissa_niter_4"}, {"layer_replication": [[0, 2]]}, {"from_the_future": 3}],
)
def test_rebuild_config_names_the_setting_it_refuses(change):
    with pytest.raises(AdapterError, match=next(iter(change))):
        rebuild_config({"peft_type": "LORA"} | change, {}, build(ViTModel, ViTConfig(**SIZES)))
