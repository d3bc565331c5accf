import hashlib
import json
import os

import pytest
import torch
from helpers_adapters import (
    ATTENTION,
    CONFIGS,
    SIZES,
    edit_config,
    edit_tensors,
    headless_twin,
    logits_of,
    make_old,
    save_adapter,
    tiny_classifier,
)
from torch.nn.functional import linear
from transformers import ViTConfig, ViTModel

from lora_recycle.adapters.load import load_adapter
from lora_recycle.adapters.places import find_adapters
from lora_recycle.adapters.pull import pull_adapter
from lora_recycle.errors import AdapterError


WEIGHTS = "adapter_model.safetensors"
HEAD = "base_model.model.classifier."


@pytest.fixture
def adapter(tmp_path):
    """A saved adapter's folder and the headless backbone that it was trained on."""
    folder = tmp_path / "flowers"
    _, backbone = save_adapter(folder)
    return folder, backbone


@torch.no_grad()
@pytest.mark.parametrize("generation", [4, 5])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_loaded_adapter_gives_the_logits_of_the_original(tmp_path, kind, generation):
    model, backbone = save_adapter(tmp_path, CONFIGS[kind])
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    bare = backbone(pixel_values=pixels).last_hidden_state
    if generation == 4:
        if kind == "ia3":
            edit_config(tmp_path, feedforward_modules=["intermediate.dense"])
        if kind == "pattern":
            old = {"rank_pattern": {"query": 2}, "alpha_pattern": {r"layer\.1\.intermediate\.dense": 32}}
            edit_config(tmp_path, **old)
        make_old(tmp_path)
    loaded = load_adapter(pull_adapter(tmp_path), backbone)
    assert loaded.info.generation == generation
    torch.testing.assert_close(backbone(pixel_values=pixels).last_hidden_state, bare, rtol=0, atol=0)
    expected = model(pixel_values=pixels).logits
    torch.testing.assert_close(logits_of(loaded, backbone, pixels), expected, rtol=1e-4, atol=1e-5)
    base = linear(bare[:, 0], loaded.head_weight, loaded.head_bias)
    assert (expected - base).abs().max() > 1e-2  # the adapter does something


def test_info_describes_the_adapter(adapter):
    folder, _ = adapter
    edit_config(folder, base_model_name_or_path="google/vit", revision="abc")
    info = pull_adapter(folder)
    data = (folder / WEIGHTS).read_bytes()
    assert (info.name, info.revision, info.path) == ("flowers", None, folder)
    assert (info.base_model, info.base_revision) == ("google/vit", "abc")
    assert (info.peft_type, info.rank, info.alpha, info.targets) == ("LORA", 4, 8, ("q_proj", "v_proj"))
    assert (info.num_classes, info.labels, info.generation) == (3, None, 5)
    assert (info.size_bytes, info.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert info.num_parameters == 2 * 2 * (4 * 32 + 32 * 4) + 3 * 32 + 3
    assert json.loads(json.dumps(info.to_dict()))["path"] == str(folder)


def test_generation_4_is_seen_without_a_model(adapter):
    make_old(adapter[0])
    info = pull_adapter(adapter[0])
    assert (info.generation, info.targets) == (4, ("query", "value"))


def test_load_keeps_the_model_and_splits_the_head(adapter):
    folder, backbone = adapter
    before = {key: tensor.clone() for key, tensor in backbone.state_dict().items()}
    loaded = load_adapter(pull_adapter(folder), backbone)
    assert all(torch.equal(before[key], tensor) for key, tensor in backbone.state_dict().items())
    assert {p.device.type for p in backbone.parameters()} == {"cpu"}
    assert loaded.head_weight.shape == (3, 32) and loaded.head_bias.shape == (3,)
    assert len(loaded.state_dict) == 8
    assert {tensor.dtype for tensor in loaded.state_dict.values()} == {torch.float32}
    assert loaded.peft_config.target_modules == {f"layers.{i}.attention.{n}" for i in (0, 1) for n in ATTENTION}


def test_half_precision_and_wrapped_heads_load_as_float32(adapter):
    folder, backbone = adapter
    wrapped = HEAD + "modules_to_save.default."
    edit_tensors(folder, lambda ts: {k.replace(HEAD, wrapped): t.bfloat16() for k, t in ts.items()})
    loaded = load_adapter(pull_adapter(folder), backbone)
    assert loaded.head_weight.dtype == loaded.head_bias.dtype == torch.float32
    assert {tensor.dtype for tensor in loaded.state_dict.values()} == {torch.float32}


def test_an_adapter_without_head_loads(adapter):
    folder, backbone = adapter
    edit_tensors(folder, lambda tensors: {k: t for k, t in tensors.items() if not k.startswith(HEAD)})
    info = pull_adapter(folder)
    loaded = load_adapter(info, backbone)
    assert info.num_classes is loaded.head_weight is loaded.head_bias is None


@pytest.mark.parametrize(
    ("front_matter", "labels"),
    [
        ("id2label: {1: rose, 0: daisy, 2: tulip}", ("daisy", "rose", "tulip")),
        ("id2label: {'0': a, '1': b, '2': c}", ("a", "b", "c")),
        ("labels: [daisy, rose, tulip]", ("daisy", "rose", "tulip")),
        ("labels: [daisy, rose]", None),
        ("id2label: {0: a, 1: b, 3: c}", None),
        ("labels: [unclosed", None),
        ("labels: 3", None),
        ("license: mit", None),
    ],
)
def test_labels_come_from_the_card(adapter, front_matter, labels):
    folder, _ = adapter
    (folder / "README.md").write_text(f"---\n{front_matter}\n---\n# Flowers\n")
    assert pull_adapter(folder).labels == labels


def test_find_adapters(adapter):
    folder, _ = adapter
    (folder.parent / "empty").mkdir()
    save_adapter(folder.parent / "birds")
    save_adapter(folder.parent / ".unfinished")
    assert find_adapters(folder) == [folder]
    assert find_adapters(folder.parent) == [folder.parent / "birds", folder]
    with pytest.raises(AdapterError, match="empty: no adapter"):
        find_adapters(folder.parent / "empty")
    with pytest.raises(AdapterError, match="nowhere: no such folder"):
        find_adapters(folder / "nowhere")


def test_neither_folder_nor_repo(tmp_path):
    for name in ("nobody/nothing", str(tmp_path / "not" / "a" / "repo")):
        with pytest.raises(AdapterError, match=f"{name}: no such folder or repo"):
            pull_adapter(name, cache_dir=tmp_path / "cache", local_files_only=True)


def test_a_folder_has_no_revision(adapter):
    with pytest.raises(AdapterError, match="no revision 'v1'"):
        pull_adapter(adapter[0], revision="v1")


def test_a_cached_repo_is_found_with_its_commit(tmp_path, adapter):
    commit, repo = "a" * 40, tmp_path / "cache" / "models--me--flowers"
    snapshot, blobs = repo / "snapshots" / commit, repo / "blobs"
    for folder in (snapshot, blobs, repo / "refs"):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    for name in ("adapter_config.json", WEIGHTS):
        (blobs / name).write_bytes((adapter[0] / name).read_bytes())
        (snapshot / name).symlink_to(os.path.relpath(blobs / name, snapshot))
    info = pull_adapter("me/flowers", cache_dir=tmp_path / "cache", local_files_only=True)
    assert (info.name, info.revision, info.num_classes) == ("me/flowers", commit, 3)
    with pytest.raises(AdapterError, match="me/flowers@v2: .*cache"):
        pull_adapter("me/flowers", "v2", cache_dir=tmp_path / "cache", local_files_only=True)


def test_missing_files_are_named(adapter):
    folder, _ = adapter
    (folder / WEIGHTS).rename(folder / "aside")
    with pytest.raises(AdapterError, match=f"flowers: {WEIGHTS} is missing"):
        pull_adapter(folder)
    (folder / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(AdapterError, match="adapter_model.bin is there, and unpickling"):
        pull_adapter(folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(AdapterError, match="adapter_config.json is missing"):
        pull_adapter(folder)


def test_links_out_of_the_folder_are_refused(adapter, tmp_path):
    folder, _ = adapter
    (folder / WEIGHTS).rename(tmp_path / "elsewhere")
    (folder / WEIGHTS).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AdapterError, match=f"{WEIGHTS} is a link that leaves"):
        pull_adapter(folder)


@pytest.mark.parametrize(
    "damage", [lambda d: d[:-10], lambda d: d[:20], lambda d: b"", lambda d: d + b"x", lambda d: b"no"]
)
def test_damaged_weights(adapter, damage):
    path = adapter[0] / WEIGHTS
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(AdapterError, match=f"flowers: {WEIGHTS} is truncated or damaged"):
        pull_adapter(adapter[0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{not json", "not valid JSON"),
        ("[1]", "JSON object, got a list"),
        ("\xff", "not valid JSON"),
        ("{}", "peft_type None"),
        ('{"peft_type": "MAGIC"}', "'MAGIC'"),
        ('{"peft_type": ["LORA"]}', "LORA"),
    ],
)
def test_bad_config(adapter, text, message):
    (adapter[0] / "adapter_config.json").write_text(text, encoding="latin-1")
    with pytest.raises(AdapterError, match=f"flowers: adapter_config.json.*{message}"):
        pull_adapter(adapter[0])


Q = "base_model.model.vit.layers.0.attention.q_proj.lora_A.weight"
LIVE_Q = Q.replace("vit.", "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({Q: torch.full((4, 32), float("nan"))}, f"{LIVE_Q} holds NaN"),
        ({HEAD + "bias": torch.full((3,), float("inf"))}, f"{HEAD}bias holds NaN or infinity"),
        ({Q: torch.ones(4, 32, dtype=torch.int32)}, f"{LIVE_Q} must be floating point, got torch.int32"),
        ({Q: None}, f"lacks 1 tensor.*{LIVE_Q}"),
        ({Q.replace("lora_A", "lora_C"): torch.ones(4, 32)}, "unexpected 1 tensor.*q_proj.lora_C.weight"),
        ({"base_model.model.vit.layernorm.weight": torch.ones(31)}, r"layernorm.weight must be \(32,\), got \(31,\)"),
        ({"base_model.model.vit.layers.9.mlp.fc1.lora_A.weight": torch.ones(4, 32)}, "vit.layers.9.mlp.fc1.lora_A"),
        ({Q: torch.ones(2, 32)}, rf"{LIVE_Q} must be \(4, 32\), got \(2, 32\)"),
        ({HEAD + "weight": torch.ones(3, 48)}, f"{HEAD}weight reads 48 features, but the model has 32 .*base model"),
    ],
)
def test_bad_tensors_are_named(adapter, change, message):
    folder, backbone = adapter
    edit_tensors(folder, lambda ts: {k: t for k, t in (ts | change).items() if t is not None})
    info = pull_adapter(folder)
    with pytest.raises(AdapterError, match=f"flowers: {WEIGHTS}.*{message}"):
        load_adapter(info, backbone)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({HEAD + "weight": torch.ones(100_001, 1)}, "1 to 100000 classes"),
        ({HEAD + "weight": torch.ones(3)}, r"\(3,\)"),
        ({HEAD + "weight": None}, "classifier.bias"),
        ({HEAD + "bias": torch.ones(4)}, r"classifier.bias must be \(3,\)"),
        ({"base_model.model.head.weight": torch.ones(3, 32)}, "one head.*classifier.weight.*head.weight"),
    ],
)
def test_bad_heads_are_refused_before_loading(adapter, change, message):
    edit_tensors(adapter[0], lambda ts: {k: t for k, t in (ts | change).items() if t is not None})
    with pytest.raises(AdapterError, match=f"flowers: {WEIGHTS}: .*{message}"):
        pull_adapter(adapter[0])


def test_a_head_of_cls_and_mean_patch_is_twice_as_wide(adapter):
    folder, backbone = adapter
    edit_tensors(folder, lambda tensors: tensors | {HEAD + "weight": torch.ones(3, 64)})
    assert load_adapter(pull_adapter(folder), backbone).head_weight.shape == (3, 64)


def test_an_adapter_for_another_width_says_so(adapter):
    folder, _ = adapter
    wide = ViTModel(ViTConfig(**(SIZES | {"hidden_size": 16})), add_pooling_layer=False)
    message = r"lora_A.weight must be \(4, 16\), got \(4, 32\).*another base model"
    with pytest.raises(AdapterError, match=f"flowers: .*{message}"):
        load_adapter(pull_adapter(folder), wide)


def test_an_adapter_for_a_deeper_base_says_so(adapter):
    shallow = headless_twin(tiny_classifier(num_hidden_layers=1))
    with pytest.raises(AdapterError, match=r"flowers: .*vit\.layers\.1\..*another base model"):
        load_adapter(pull_adapter(adapter[0]), shallow)


def test_a_file_that_changed_after_the_pull_is_refused(adapter):
    folder, backbone = adapter
    info = pull_adapter(folder)
    edit_tensors(folder, lambda tensors: {key: tensor + 1 for key, tensor in tensors.items()})
    with pytest.raises(AdapterError, match=f"flowers: {WEIGHTS} changed since it was pulled"):
        load_adapter(info, backbone)
