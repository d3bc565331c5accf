"""A base model is loaded whole, as its files say and under one lock, or refused with the file and what is wrong."""

import json
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers_adapters import ATTENTION, save_adapter
from helpers_clip import save_tiny_pair
from helpers_tiny import SIZES, random_pixels, save_tiny_backbone, shake, tiny_processor, tiny_vit
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    DeiTConfig,
    DeiTModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ViTConfig,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTModel,
)

from lora_recycle import AdapterPool
from lora_recycle.adapters import peft_wrap
from lora_recycle.adapters.paper_format import import_paper_file
from lora_recycle.backbones.backbone import Backbone, extract_features
from lora_recycle.backbones.base_models import BaseModel
from lora_recycle.errors import AdapterError
from lora_recycle.pool.training import load_classifier


WEIGHTS, CONFIG, PROCESSOR = "model.safetensors", "config.json", "preprocessor_config.json"


@pytest.fixture
def base(tmp_path):
    return save_tiny_backbone(tmp_path / "base")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder, change):
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})


def refused(folder, message):
    with pytest.raises(AdapterError, match=message) as caught:
        Backbone.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def save_family(folder, family):
    if family in ("clip", "siglip"):
        save_tiny_pair(folder, family)
        return folder
    kinds = {
        "vit": (ViTModel, ViTConfig),
        "deit": (DeiTModel, DeiTConfig),
        "dinov2": (Dinov2Model, Dinov2Config),
        "registers": (Dinov2WithRegistersModel, Dinov2WithRegistersConfig),
    }
    kind, config = kinds[family]
    shake(kind(config(**SIZES))).save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


# what a checkpoint lacks


@pytest.mark.parametrize("family", ["vit", "deit", "dinov2", "registers", "clip", "siglip"])
def test_a_checkpoint_that_lacks_a_weight_is_refused_by_name(tmp_path, family):
    folder = save_family(tmp_path / family, family)
    whole = Backbone.from_pretrained(folder)
    assert extract_features(whole, random_pixels(2)).isfinite().all()
    lost = next(key for key in sorted(load_file(folder / WEIGHTS)) if "text" not in key and key.endswith("norm.bias"))
    edit_weights(folder, lambda tensors: {key: tensor for key, tensor in tensors.items() if key != lost})
    refused(folder, rf"{family}: model.safetensors lacks 1 tensor\(s\) of the model: [\w.]*norm.bias")


def test_a_renamed_weight_is_a_missing_one(base):
    edit_weights(base, lambda tensors: {key.replace("layernorm.weight", "ln.weight"): t for key, t in tensors.items()})
    refused(base, r"base: model.safetensors lacks 1 tensor\(s\) of the model: layernorm.weight\. Do config.json and")


def test_more_layers_than_the_file_has_are_refused(base):
    edit(base / CONFIG, num_hidden_layers=4)
    refused(base, r"base: model.safetensors lacks 32 tensor\(s\) of the model: layers.2.attention.k_proj.bias, ")


def test_fewer_layers_than_the_file_has_are_another_model(base):
    edit(base / CONFIG, num_hidden_layers=1)
    refused(
        base, r"base: model.safetensors holds 16 tensor\(s\) of layers that config.json does not describe: layers.1"
    )


def test_weights_of_another_shape_are_refused_by_name(base):
    edit(base / CONFIG, intermediate_size=48)
    refused(base, r"base: model.safetensors: layers.0.mlp.fc1.bias must be \(48,\), got \(64,\)")


def test_what_no_embedding_passes_may_be_missing_or_there(tmp_path):
    """Heads and poolers of classifiers, the mask token of DINOv2."""
    for name, kind, options in (
        ("classifier", ViTForImageClassification, {"num_labels": 7}),
        ("masked", ViTForMaskedImageModeling, {"encoder_stride": 8}),
    ):
        shake(kind(ViTConfig(**SIZES, **options))).save_pretrained(tmp_path / name)
        tiny_processor().save_pretrained(tmp_path / name)
        assert extract_features(Backbone.from_pretrained(tmp_path / name), random_pixels(1)).isfinite().all()
    folder = save_family(tmp_path / "dinov2", "dinov2")
    expected = extract_features(Backbone.from_pretrained(folder), random_pixels(1))
    edit_weights(folder, lambda tensors: {key: t for key, t in tensors.items() if "mask_token" not in key})
    assert torch.equal(extract_features(Backbone.from_pretrained(folder), random_pixels(1)), expected)


def test_a_classifier_begins_with_a_new_head_and_nothing_else_new(base):
    assert load_classifier(BaseModel.pull(base), ["a", "b", "c"]).classifier.weight.shape == (3, 32)
    edit_weights(base, lambda tensors: {key: t for key, t in tensors.items() if key != "layernorm.bias"})
    with pytest.raises(AdapterError, match=r"base: model.safetensors lacks 1 tensor\(s\) of the model: vit.layernorm"):
        load_classifier(BaseModel.pull(base), ["a", "b", "c"])


def test_the_whole_model_of_the_papers_format_is_held_to_the_same(tmp_path):
    save_tiny_pair(tmp_path / "clip")
    save_file({"w_a_000": torch.zeros(2, 32)}, tmp_path / "lora.safetensors")
    edit_weights(
        tmp_path / "clip", lambda tensors: {k: t for k, t in tensors.items() if k != "text_projection.weight"}
    )
    with pytest.raises(AdapterError, match=r"clip: model.safetensors lacks 1 tensor\(s\) of the model: text_proj"):
        import_paper_file(tmp_path / "lora.safetensors", tmp_path / "clip", tmp_path / "out")


def test_a_checkpoint_in_several_files_is_whole_or_refused(base):
    expected = extract_features(Backbone.from_pretrained(base), random_pixels(2))
    (base / WEIGHTS).unlink()
    tiny_vit().save_pretrained(base, max_shard_size="20KB")
    shards = sorted(path.name for path in base.glob("model-*.safetensors"))
    assert len(shards) > 2 and torch.equal(
        extract_features(Backbone.from_pretrained(base), random_pixels(2)), expected
    )
    index = base / "model.safetensors.index.json"
    told = json.loads(index.read_text())
    for name in ("../../elsewhere.safetensors", "/etc/passwd", "model-9-of-9.safetensors", "pytorch_model.bin"):
        index.write_text(json.dumps({"weight_map": told["weight_map"] | {"x": name}}))
        refused(base, "base: model.safetensors.index.json names files that are not there")
    for text in ("[]", "{}", "{", '{"weight_map": 3}', '{"weight_map": {"a": []}}'):
        index.write_text(text)
        refused(base, "base: model.safetensors.index.json is damaged")
    index.write_text(json.dumps(told))
    (base / shards[0]).write_bytes(b"short")
    refused(base, f"base: {shards[0]} is truncated or damaged")


def test_weights_that_are_no_safetensors_are_not_read(base):
    torch.save({}, base / "pytorch_model.bin")
    (base / WEIGHTS).unlink()
    refused(base, "base: the backbone cannot be loaded .model.safetensors is missing; weights of other formats could")


# numbers that no image survives


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_std": [0, 0, 0]}, r"image_std must be three positive numbers, got .0, 0, 0.\."),
        ({"image_std": [0.5, -0.5, 0.5]}, "image_std must be three positive numbers"),
        ({"image_std": [0.5, 0.5]}, "image_std must be three positive numbers"),
        ({"image_mean": [0.5, "0.5", 0.5]}, "image_mean must be three numbers"),
        ({"image_mean": [1e30] * 3}, "image_mean must be three numbers"),
        ({"rescale_factor": 0}, "rescale_factor must be positive, got 0"),
        ({"resample": 99}, "base: .*99"),
        ({"size": {"height": 10**9, "width": 10**9}}, "size: height must be a whole number from 1 to 4096"),
        ({"size": {"height": 0, "width": 0}}, "size: height must be a whole number"),
        ({"size": "large"}, "base: the backbone cannot be loaded"),
        ({"size": {"longest_edge": 32}}, "image processor: it fails on an image ."),
        ({"image_processor_type": "NoneSuch", "auto_map": {"AutoImageProcessor": "evil.Evil"}}, "custom code"),
    ],
)
def test_image_processors_are_checked_when_they_are_loaded(base, change, message):
    edit(base / PROCESSOR, **change)
    refused(base, message)


def test_an_image_processor_that_python_made_is_checked_too():
    processor = tiny_processor()
    processor.image_std = [0.0] * 3
    with pytest.raises(AdapterError, match="tiny: image processor: image_std must be three positive numbers"):
        Backbone(tiny_vit(), processor, "tiny")


# a stranger's config.json


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 0}, "hidden_size must be a whole number from 1 to 16384, got 0"),
        ({"hidden_size": -32}, "hidden_size must be a whole number"),
        ({"hidden_size": "32"}, "hidden_size must be a whole number from 1 to 16384, got '32'"),
        ({"hidden_size": 10**9}, "hidden_size must be a whole number"),
        ({"hidden_size": True}, "hidden_size must be a whole number"),
        ({"hidden_size": 33}, "hidden_size 33 cannot be divided among num_attention_heads 2"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a whole number from 1"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be a whole number from 1 to 1000"),
        ({"num_hidden_layers": 1000}, "describes a model of at least 8198656 parameters, but model.safetensors holds"),
        ({"num_hidden_layers": 1000, "hidden_size": 8192, "intermediate_size": 32768}, "more than 4000000000"),
        ({"num_channels": 1}, "num_channels must be a whole number from 3 to 3"),
        ({"image_size": [32, 64]}, "image_size must be one whole number, as images are square"),
        ({"image_size": 10**6}, "image_size must be one whole number"),
        ({"image_size": 4}, "image_size 4 is smaller than patch_size 8"),
        ({"image_size": 4096, "patch_size": 1}, "give 16777216 patches, more than 16384"),
        ({"patch_size": 0}, "patch_size must be one whole number"),
        ({"hidden_act": "evil"}, "transformers knows no activation 'evil'"),
        ({"hidden_act": ["gelu"]}, "transformers knows no activation a list"),
        ({"layer_norm_eps": "tiny"}, "layer_norm_eps must be a number from 0 to 1"),
        ({"layer_norm_eps": -1}, "layer_norm_eps must be a number from 0 to 1, got -1"),
        ({"qkv_bias": 1}, "qkv_bias must be true or false, got 1"),
        ({"model_type": "llama"}, "backbones of type llama are not supported .vit, deit"),
        ({"model_type": None}, "backbones of type None are not supported"),
        ({"model_type": ["vit"]}, "are not supported"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "its weights are quantized"),
        ({"auto_map": {"AutoModel": "evil.Evil"}}, "it names custom code"),
    ],
)
def test_absurd_settings_are_refused_before_they_take_memory(base, change, message):
    edit(base / CONFIG, **change)
    refused(base, f"base: .*{message}")


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '{"hidden_size": NaN}', "[" * 10_000, '{"a": 1, "a": 2}'])
def test_a_config_that_is_no_plain_json_object_is_refused(base, text):
    (base / CONFIG).write_text(text)
    refused(base, "base: config.json: ")


@pytest.mark.parametrize(
    "change",
    [
        {"attn_implementation": "someone/kernel", "_attn_implementation": "someone/kernel"},
        {"_attn_implementation_internal": "someone/kernel"},
        {"__class__": "evil", "__dict__": {}, "_name_or_path": "/etc/passwd", "name_or_path": 3},
        {"transformers_weights": "../other.safetensors", "fusion_config": {"a": 1}, "distributed_config": {"tp": 2}},
        {"id2label": {"x": "y"}, "num_labels": 10**9, "problem_type": "none", "dtype": "evil", "torch_dtype": 3},
        {"pruned_heads": {"0": [0]}, "chunk_size_feed_forward": 10**9, "is_encoder_decoder": "yes"},
        {"output_attentions": True, "output_hidden_states": True, "return_dict": False},
    ],
)
def test_settings_that_no_encoder_needs_never_reach_transformers(base, monkeypatch, change):
    expected = extract_features(Backbone.from_pretrained(base), random_pixels(2))
    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", lambda *args, **kw: pytest.fail())
    edit(base / CONFIG, **change)
    assert torch.equal(extract_features(Backbone.from_pretrained(base), random_pixels(2)), expected)


def test_an_adapter_beside_the_base_is_not_worn_unseen(tmp_path, base, hub):
    save_adapter(tmp_path / "adapter")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (base / name).write_bytes((tmp_path / "adapter" / name).read_bytes())
    refused(base, "base: holds adapter_config.json beside the base model")
    hub.put("org/both", base)
    refused("org/both", "org/both: holds adapter_config.json beside the base model")


def test_a_base_of_the_hub_comes_from_one_commit_with_nothing_but_what_is_needed(base, hub):
    (base / "evil.py").write_text("raise SystemExit")
    hub.put("org/base", base)
    backbone = Backbone.from_pretrained("org/base")
    assert backbone.revision == hub.repo("org/base").resolve("main").sha
    pulled = BaseModel.pull("org/base")
    assert sorted(path.name for path in pulled.folder.iterdir()) == [CONFIG, WEIGHTS, PROCESSOR]
    expected = extract_features(Backbone.from_pretrained(base), random_pixels(1))
    assert torch.equal(extract_features(backbone, random_pixels(1)), expected)


def test_import_never_offers_to_run_the_bases_code(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *question: pytest.fail("asked the user"))
    save_tiny_pair(tmp_path / "clip")
    edit(tmp_path / "clip" / CONFIG, model_type="evil", auto_map={"AutoConfig": "evil.Evil"})
    save_file({"w_a_000": torch.zeros(2, 32)}, tmp_path / "lora.safetensors")
    with pytest.raises(
        AdapterError, match=r"clip: config.json: it names custom code \(auto_map\), which is never run"
    ):
        import_paper_file(tmp_path / "lora.safetensors", tmp_path / "clip", tmp_path / "out")


def test_settings_of_either_tower_are_checked(tmp_path):
    save_tiny_pair(tmp_path / "clip")
    told = json.loads((tmp_path / "clip" / CONFIG).read_text())
    for part, change, message in (
        ("vision_config", {"hidden_size": 0}, "hidden_size must be"),
        ("vision_config", 3, "vision_config must be a JSON object, got a int"),
        ("vision_config_dict", {"num_hidden_layers": -1}, "num_hidden_layers must be"),
        ("vision_config", {"num_attention_heads": 12}, "config.json: The hidden size .32. is not a multiple of"),
    ):
        changed = told.get(part, {}) | change if isinstance(change, dict) else change
        (tmp_path / "clip" / CONFIG).write_text(json.dumps(told | {part: changed}))
        refused(tmp_path / "clip", message)
    (tmp_path / "clip" / CONFIG).write_text(json.dumps(told | {"text_config": {"vocab_size": 10**12}}))
    Backbone.from_pretrained(tmp_path / "clip")  # which needs no text
    with pytest.raises(AdapterError, match="vocab_size must be a whole number"):
        BaseModel.pull(tmp_path / "clip").whole_config()


# threads


def test_checking_an_adapter_leaves_the_modules_of_other_threads_alone(tmp_path, tiny_backbone_path, monkeypatch):
    devices, update = [], LoraLayer.update_layer

    def meanwhile(*args, **kwargs):
        with ThreadPoolExecutor(1) as other:
            devices.append(other.submit(lambda: nn.Linear(2, 2).weight.device.type).result())
        return update(*args, **kwargs)

    monkeypatch.setattr(LoraLayer, "update_layer", meanwhile)
    save_adapter(tmp_path, LoraConfig(r=2, target_modules=ATTENTION))
    AdapterPool.from_pretrained(tmp_path, tiny_backbone_path)
    assert len(devices) >= 4 and set(devices) == {"cpu"}


def test_models_are_built_one_at_a_time_whatever_the_number_of_threads(tmp_path, tiny_backbone_path, monkeypatch):
    """transformers and PEFT replace functions of torch while they build; two at once would restore each other's."""
    inside, most, load, wrap = [], [], ViTModel.from_pretrained, peft_wrap.get_peft_model
    save_adapter(tmp_path, LoraConfig(r=2, target_modules=ATTENTION))

    def counted(build):
        def run(*args, **kwargs):
            inside.append(threading.get_ident())
            most.append(len(set(inside)))
            time.sleep(0.01)
            try:
                return build(*args, **kwargs)
            finally:
                inside.remove(threading.get_ident())

        return run

    monkeypatch.setattr(ViTModel, "from_pretrained", counted(load))
    monkeypatch.setattr(peft_wrap, "get_peft_model", counted(wrap))
    initialise, filters = nn.init.kaiming_uniform_, list(warnings.filters)
    with ThreadPoolExecutor(6) as threads:
        pools = list(threads.map(lambda _: AdapterPool.from_pretrained(tmp_path, tiny_backbone_path), range(6)))
    assert len(pools) == 6 and len(most) == 12 and set(most) == {1}
    assert nn.init.kaiming_uniform_ is initialise and list(warnings.filters) == filters
    assert nn.Linear(2, 2).weight.device.type == "cpu" and torch.get_default_dtype() is torch.float32
