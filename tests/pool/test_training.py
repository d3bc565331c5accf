"""Adapters as a stranger would publish them, and a pool made of any labelled images."""

import contextlib
import dataclasses
import json
import shutil

import pytest
import torch
from helpers_tiny import shake, tiny_processor
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import Dinov2Config, Dinov2Model, ViTForImageClassification

from lora_recycle.adapters.places import find_adapters
from lora_recycle.adapters.pull import pull_adapter
from lora_recycle.errors import ConfigError, DataError, StorageError
from lora_recycle.images.labelled import LabelledImages
from lora_recycle.pool import training
from lora_recycle.pool.config import AdapterTrainingConfig
from lora_recycle.pool.pool import AdapterPool
from lora_recycle.pool.training import augment, split_task, train_adapter, train_adapters


@pytest.fixture(scope="module")
def tuned_path(tmp_path_factory, tiny_backbone_path, toy_data):
    """Adapters of 4 classes each: LoRA, LoRA on q and v only, DoRA, LoHa."""
    folder = tmp_path_factory.mktemp("tuned")
    kinds = [("LORA", "all"), ("LORA", "q_proj,v_proj"), ("DORA", "all"), ("LOHA", "all")]
    for task, (kind, targets) in enumerate(kinds):
        config = AdapterTrainingConfig(
            peft_type=kind, targets=targets, epochs=6, lr=8e-3, rank=4, keep_ratio=1.0, batch_size=16
        )
        classes = list(range(task, task + 4))
        train_adapter(toy_data, classes, folder / f"adapter-{task}", config, str(tiny_backbone_path), seed=task)
    return folder


@pytest.fixture(scope="module")
def tuned(tuned_path):
    return AdapterPool.from_pretrained(tuned_path)


@torch.no_grad()
def test_peft_loads_what_was_tuned_with_the_same_logits(tuned, tuned_path, tiny_backbone_path, toy_data):
    x = tuned.backbone.normalize(toy_data.pixels[::8])
    for i, kind in enumerate(("LORA", "LORA", "LORA", "LOHA")):
        assert tuned[i].info.peft_type == kind
        base = ViTForImageClassification.from_pretrained(tiny_backbone_path, num_labels=4)
        expected = PeftModel.from_pretrained(base, tuned_path / f"adapter-{i}").eval()(pixel_values=x).logits
        with tuned.folded(i) as backbone:
            logits = tuned[i].logits(backbone, backbone(x)[0])
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_tuned_adapters_know_their_classes(tuned, toy_data):
    """Colours of classes lie 12 grey levels apart or more; the noise moves an image's mean colour by half of one."""
    for i, adapter in enumerate(tuned):
        rows = (toy_data.labels >= i) & (toy_data.labels < i + 4)
        with tuned.folded(i) as backbone:
            hidden, _ = backbone(backbone.normalize(toy_data.pixels[rows]))
        said = adapter.logits(backbone, hidden).argmax(1)
        assert (said == toy_data.labels[rows] - i).float().mean() > 0.8


def test_the_folder_is_what_people_publish(tuned_path, tiny_backbone_path):
    folder = tuned_path / "adapter-1"
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    info = pull_adapter(folder)
    assert info.labels == ("n1", "n2", "n3", "n4") and info.num_classes == 4
    assert info.base_model == str(tiny_backbone_path) and info.rank == 4
    assert info.targets == ("q_proj", "v_proj")
    assert pull_adapter(tuned_path / "adapter-2").config["use_dora"] is True
    assert "Accuracy on held-out images" in (folder / "README.md").read_text()
    assert not list(tuned_path.glob(".*"))


def test_awkward_class_names_survive_the_card(toy_data, tiny_backbone_path, tmp_path):
    names = ["yes", "3", "a: b # c", 'quote "x"', "Käse", "null", "- x", "{y}"]
    data = LabelledImages(toy_data.pixels, toy_data.labels, names, "odd")
    config = AdapterTrainingConfig(epochs=1, rank=2, targets="q_proj")
    train_adapter(data, list(range(8)), tmp_path / "odd", config, str(tiny_backbone_path), 0)
    assert pull_adapter(tmp_path / "odd").labels == tuple(names)


def test_other_families_learn_from_the_centres_of_what_their_head_reads(toy_data, tmp_path):
    """DINOv2's head reads CLS and the mean patch; its file may hold float16, in which nothing would be learnt."""
    config = Dinov2Config(
        image_size=32, patch_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2
    )
    torch.manual_seed(0)
    shake(Dinov2Model(config)).half().save_pretrained(tmp_path / "base")
    tiny_processor().save_pretrained(tmp_path / "base")
    tuning = AdapterTrainingConfig(epochs=2, rank=2, targets="q_proj", keep_ratio=1.0)
    found = train_adapter(toy_data, [0, 1, 2, 3], tmp_path / "adapter", tuning, str(tmp_path / "base"), 0)
    pool = AdapterPool.from_pretrained(tmp_path / "adapter")
    assert pool[0].head.weight.shape == (4, 32) and pool[0].head.weight.isfinite().all()
    assert found["accuracy"] > 90


def test_same_seed_same_adapter(toy_data, tiny_backbone_path, tmp_path):
    config = AdapterTrainingConfig(epochs=1, rank=2, targets="q_proj")
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        train_adapter(toy_data, [0, 1], tmp_path / name, config, str(tiny_backbone_path), seed)
    one, same, other = (pull_adapter(tmp_path / name).sha256 for name in ("one", "same", "other"))
    assert one == same != other


@pytest.mark.parametrize("peft_type", ["LORA", "DORA"])
@pytest.mark.usefixtures("launched_with_bf16")
def test_bfloat16_casts_no_input_of_a_lora_to_and_fro(peft_type, toy_data, tiny_backbone_path, tmp_path, monkeypatch):
    config, fit, seen = AdapterTrainingConfig(images_per_class=8, epochs=1, peft_type=peft_type), training._fit, {}

    def watched(wrapped, *rest):
        layers = [m for m in wrapped.modules() if hasattr(m, "lora_A")]
        inputs = seen[name] = set()
        for layer in layers:
            layer.lora_A["default"].register_forward_pre_hook(lambda _, args: inputs.add(args[0].dtype))
        fit(wrapped, *rest)
        seen["layers"] = layers

    monkeypatch.setattr(training, "_fit", watched)
    for name in ("as it is", "with casts"):
        train_adapter(toy_data, [0, 1], tmp_path / name, config, str(tiny_backbone_path), 0)
        assert all(layer.cast_input_dtype_enabled for layer in seen["layers"])
        monkeypatch.setattr(training, "disable_input_dtype_casting", lambda *args: contextlib.nullcontext())
    assert torch.bfloat16 not in seen["with casts"] and (torch.bfloat16 in seen["as it is"]) == (peft_type == "LORA")
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("as it is", "with casts"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture
def image_folder(toy_data, tmp_path):
    folder = tmp_path / "images"
    for c in range(3):
        (folder / f"class {c}").mkdir(parents=True)
        for i in toy_data.by_class()[c][:6].tolist():
            Image.fromarray(toy_data.pixels[i].permute(1, 2, 0).numpy()).save(folder / f"class {c}" / f"{i}.png")
    return folder


def test_a_pool_resumes_where_it_stopped(image_folder, tiny_backbone_path, tmp_path, monkeypatch):
    config = AdapterTrainingConfig(tasks=3, classes=2, epochs=1, rank=2, targets="q_proj", batch_size=8)
    monkeypatch.chdir(tiny_backbone_path.parent)
    results = train_adapters(image_folder, tmp_path / "pool", config, tiny_backbone_path.name, progress=False)
    monkeypatch.chdir(tmp_path)  # where the relative path leads nowhere
    assert len(AdapterPool.from_pretrained(tmp_path / "pool")) == 3
    folders = find_adapters(tmp_path / "pool")
    assert [f.name for f in folders] == ["images-000", "images-001", "images-002"] and len(results) == 3
    assert set(results[0]) == {"adapter", "accuracy", "frozen_prototypes"}
    assert set(pull_adapter(folders[0]).labels) <= {"class 0", "class 1", "class 2"}
    times = [(f / "adapter_model.safetensors").stat().st_mtime_ns for f in folders]
    before = (folders[1] / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(folders[1])
    left = tmp_path / "pool" / ".images-001.0123456789abcdef.partial"  # by a run that was killed
    left.mkdir()
    (left / ".lora-recycle.lock").touch()
    again = train_adapters(image_folder, tmp_path / "pool", config, str(tiny_backbone_path), progress=False)
    assert [r["adapter"] for r in again] == [str(folders[1])]
    after = [(f / "adapter_model.safetensors").stat().st_mtime_ns for f in folders]
    assert after[0] == times[0] and after[2] == times[2] and after[1] > times[1]
    assert (folders[1] / "adapter_model.safetensors").read_bytes() == before and not left.exists()


def test_a_folder_of_the_user_is_not_replaced(image_folder, tiny_backbone_path, tmp_path, file_size_limit):
    config = AdapterTrainingConfig(tasks=2, classes=2, epochs=1, rank=2, targets="q_proj", batch_size=8)
    mine = tmp_path / "pool" / "images-001"
    mine.mkdir(parents=True)
    (mine / "holiday.jpg").touch()
    with pytest.raises(StorageError, match=r"pool: holds other files \(images-001\), which is not replaced"):
        train_adapters(image_folder, tmp_path / "pool", config, str(tiny_backbone_path), progress=False)
    assert [path.name for path in (tmp_path / "pool").rglob("*")] == ["images-001", "holiday.jpg"]  # told at once
    shutil.rmtree(mine)
    with file_size_limit(1000), pytest.raises(StorageError, match="images-000 cannot be written: File too large"):
        train_adapters(image_folder, tmp_path / "pool", config, str(tiny_backbone_path), progress=False)
    assert list((tmp_path / "pool").rglob("*")) == []
    train_adapters(image_folder, tmp_path / "pool", config, str(tiny_backbone_path), progress=False)
    assert len(find_adapters(tmp_path / "pool")) == 2
    shutil.rmtree(mine)
    mine.mkdir()
    (mine / "holiday.jpg").touch()  # now beside an adapter of ours
    with pytest.raises(StorageError, match=r"images-001: holds other files \(holiday.jpg\), which is not replaced"):
        train_adapters(image_folder, tmp_path / "pool", config, str(tiny_backbone_path), progress=False)
    assert [path.name for path in mine.iterdir()] == ["holiday.jpg"]


def test_too_few_classes(image_folder, tiny_backbone_path, tmp_path):
    with pytest.raises(DataError, match="images has 3 classes, fewer than the 4 of a task"):
        train_adapters(
            image_folder, tmp_path / "pool", AdapterTrainingConfig(classes=4), str(tiny_backbone_path), progress=False
        )
    assert not (tmp_path / "pool").exists()


def test_a_class_of_one_image_is_named(toy_data):
    rows = torch.cat([toy_data.by_class()[0], toy_data.by_class()[1][:1]])
    data = LabelledImages(toy_data.pixels[rows], toy_data.labels[rows], toy_data.label_names, "toy")
    with pytest.raises(DataError, match="toy: class 'n1' has 1 image"):
        split_task(data, [0, 1], AdapterTrainingConfig(), torch.Generator())


def test_training_and_held_out_images_do_not_overlap(toy_data):
    config = AdapterTrainingConfig(images_per_class=10, validation_images=3)
    (images, labels), (held, held_labels) = split_task(toy_data, [4, 2], config, torch.Generator().manual_seed(0))
    assert labels.tolist() == [0] * 10 + [1] * 10 and held_labels.tolist() == [0] * 3 + [1] * 3
    seen = {image.numpy().tobytes() for image in images}
    assert len(seen) == 20 and not seen & {image.numpy().tobytes() for image in held}
    of_class = {toy_data.pixels[i].numpy().tobytes() for i in toy_data.by_class()[4].tolist()}
    assert {image.numpy().tobytes() for image in images[:10]} <= of_class


def test_augmentation_shifts_and_mirrors():
    pixels = torch.arange(16, dtype=torch.uint8).view(1, 1, 1, 16).expand(200, 3, 16, 16).contiguous()
    moved = augment(pixels, True, torch.Generator().manual_seed(0), reach=2)
    assert moved.shape == pixels.shape and moved.dtype == torch.uint8
    rising = moved[:, 0, 0, -1] > moved[:, 0, 0, 0]
    assert 60 < rising.sum() < 140
    assert sorted(moved[rising, 0, 0, 8].unique().tolist()) == [6, 7, 8, 9, 10]
    straight = augment(pixels, False, torch.Generator().manual_seed(0), reach=0)
    assert torch.equal(straight, pixels)


def test_targets_that_are_not_there(toy_data, tiny_backbone_path, tmp_path):
    config = dataclasses.replace(AdapterTrainingConfig(epochs=1), targets="q_proj,query")
    with pytest.raises(ConfigError, match=r"'query'.* is no linear layer here \(fc1, fc2, k_proj"):
        train_adapter(toy_data, [0, 1], tmp_path / "a", config, str(tiny_backbone_path), 0)


def test_the_config_survives_json(tuned_path):
    config = json.loads((tuned_path / "adapter-3" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LOHA" and config["modules_to_save"] == ["classifier"]
