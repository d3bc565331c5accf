"""Surrogate data on disk: whole or refused."""

import json

import numpy as np
import pytest
import torch

from lora_recycle.errors import DataError
from lora_recycle.runtime.files import atomic_write, file_sha256
from lora_recycle.surrogate.dataset import (
    Shard,
    SurrogateDataset,
    load_shard,
    save_shard,
    shard_config_id,
    write_manifest,
)


def make_shard(name="flowers", labels=("rose", "tulip", "daisy"), count=6, seed=0, kept=True):
    generator = torch.Generator().manual_seed(seed)
    return Shard(
        adapter={"name": name, "sha256": f"sha-{name}", "labels": list(labels) if labels else None},
        pixels=torch.randint(0, 256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8),
        labels=torch.arange(count) % 3,
        teacher_logits=torch.randn(count, 3, generator=generator),
        teacher_features=torch.randn(count, 5, generator=generator).half(),
        kept_tokens=torch.randint(0, 4, (count, 2), generator=generator).to(torch.int16) if kept else None,
    )


def make_folder(folder):
    shards = [make_shard(), make_shard("birds", None, count=3, seed=1, kept=False)]
    files = [folder / "shards" / f"{shard.adapter['name']}.safetensors" for shard in shards]
    for file, shard in zip(files, shards, strict=True):
        save_shard(file, shard, "id")
    write_manifest(folder, {"config": {"lr": 0.1}}, files)
    return shards


def edit_manifest(folder, edit):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))


def test_round_trip(tmp_path):
    shards = make_folder(tmp_path)
    surrogate = SurrogateDataset.from_pretrained(tmp_path)
    assert len(surrogate) == 9 and surrogate.num_shards == 2 and surrogate.manifest["config"] == {"lr": 0.1}
    for i, shard in enumerate(shards):
        read = surrogate.shard(i, verify=True)
        assert read.adapter == shard.adapter
        for name in ("pixels", "labels", "teacher_logits", "teacher_features"):
            one, other = getattr(read, name), getattr(shard, name)
            assert torch.equal(one, other) and one.dtype == other.dtype
    assert torch.equal(surrogate.shard(0).kept_tokens, shards[0].kept_tokens)
    assert surrogate.shard(1).kept_tokens is None
    assert surrogate.shard(1).label_names == ["class 0", "class 1", "class 2"]
    assert not list(tmp_path.rglob(".*"))  # no partial files


def test_scores_by_hand(tmp_path):
    shard = make_shard()
    shard.teacher_logits = torch.zeros(6, 3)
    shard.teacher_logits[:3, 0] = 100.0  # labels are 0 1 2 0 1 2: one right for sure, three ties at a third
    assert shard.confidence == pytest.approx((1 + 0 + 0 + 3 * (1 / 3)) / 6)
    shard.teacher_logits[3:, 0] = 100.0
    assert shard.accuracy == pytest.approx(2 / 6)
    save_shard(tmp_path / "a.safetensors", shard, "id")
    surrogate = write_manifest(tmp_path, {}, [tmp_path / "a.safetensors"])
    entry = surrogate.manifest["shards"][0]
    assert entry["accuracy"] == 0.3333 and entry["sha256"] == file_sha256(tmp_path / "a.safetensors")


def test_same_content_same_bytes_and_the_settings_are_in_the_header(tmp_path):
    path, contents = tmp_path / "a.safetensors", set()
    for _ in range(8):
        save_shard(path, make_shard(), "settings-1")
        contents.add(path.read_bytes())
    assert len(contents) == 1
    assert shard_config_id(path) == "settings-1"
    assert shard_config_id(tmp_path / "none.safetensors") is None
    path.write_bytes(b"no safetensors")
    assert shard_config_id(path) is None


@pytest.mark.parametrize("length", [4, 200, -10])
def test_a_truncated_shard_is_refused(tmp_path, length):
    make_folder(tmp_path)
    path = tmp_path / "shards" / "flowers.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    surrogate = SurrogateDataset.from_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"flowers.safetensors: the shard is missing or damaged"):
        surrogate.shard(0)
    assert len(surrogate.shard(1)) == 3


def test_a_missing_shard_is_refused(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "shards" / "birds.safetensors").unlink()
    surrogate = SurrogateDataset.from_pretrained(tmp_path)
    for verify in (False, True):
        with pytest.raises(DataError, match="birds.safetensors"):
            surrogate.shard(1, verify=verify)


def test_verification_finds_an_exchanged_file(tmp_path):
    make_folder(tmp_path)
    save_shard(tmp_path / "shards" / "flowers.safetensors", make_shard(seed=9), "id")
    surrogate = SurrogateDataset.from_pretrained(tmp_path)
    assert len(surrogate.shard(0)) == 6
    with pytest.raises(DataError, match="not the file that manifest.json describes. Run invert again"):
        surrogate.shard(0, verify=True)


@pytest.mark.parametrize("file", ["../outside.safetensors", "/etc/passwd", "shards/../../x"])
def test_a_manifest_cannot_point_outside(tmp_path, file):
    make_folder(tmp_path)
    edit_manifest(tmp_path, lambda m: m["shards"][0].update(file=file))
    with pytest.raises(DataError, match="names a file outside the folder"):
        SurrogateDataset.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(shards=[]), "lists no shards"),
        (lambda m: m.update(shards={"a": 1}), "lists no shards"),
        (lambda m: m.update(config="x"), "config must be a JSON object"),
        (lambda m: m["shards"].append(3), "entry must be a JSON object"),
        (lambda m: m["shards"][0].update(num_images="6"), "num_images of a shard is '6'"),
        (lambda m: m["shards"][0].pop("accuracy"), "accuracy of a shard is None"),
        (lambda m: m["shards"][0].update(adapter="x"), "names no adapter"),
        (lambda m: m["shards"][0].update(file="manifest.json"), "no shard: 'manifest.json'"),
    ],
)
def test_a_manifest_of_another_form_is_refused(tmp_path, change, message):
    make_folder(tmp_path)
    edit_manifest(tmp_path, change)
    with pytest.raises(DataError, match=f"no readable manifest.json .*{message}"):
        SurrogateDataset.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff\xfe", b'{"format_version": 1}'])
def test_a_damaged_manifest_is_refused(tmp_path, content):
    make_folder(tmp_path)
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(DataError, match="no readable manifest.json"):
        SurrogateDataset.from_pretrained(tmp_path)


def test_a_newer_format_asks_for_an_upgrade(tmp_path):
    make_folder(tmp_path)
    edit_manifest(tmp_path, lambda m: m.update(format_version=99))
    with pytest.raises(DataError, match="newer version of lora_recycle"):
        SurrogateDataset.from_pretrained(tmp_path)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="no such folder or repo"):
        SurrogateDataset.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(DataError, match="Is the inversion finished"):
        SurrogateDataset.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pixels": torch.zeros(6, 3, 8, 8)}, "tensor pixels has the wrong type"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, "tensor labels has the wrong type or number of rows"),
        ({"teacher_logits": torch.zeros(6)}, "tensor teacher_logits must have 2 dimensions"),
        ({"teacher_logits": torch.full((6, 3), float("nan"))}, "tensor teacher_logits holds NaN or infinity"),
        ({"teacher_features": torch.full((6, 5), float("inf")).half()}, "tensor teacher_features holds NaN"),
        ({"pixels": torch.zeros(6, 1, 8, 8, dtype=torch.uint8)}, "pixels must have 3 channels, got 1"),
        ({"labels": torch.full((6,), 3)}, "labels must lie in 0 to 2, got 3"),
        (
            {"kept_tokens": torch.zeros(5, 2, dtype=torch.int16)},
            "tensor kept_tokens has the wrong type or number of rows",
        ),
        ({"kept_tokens": torch.full((6, 2), -1, dtype=torch.int16)}, "kept_tokens must lie in 0 to 63, got -1 to -1"),
        ({"adapter": {"name": "x"}}, "it names no adapter with its checksum"),
        ({"adapter": {"name": "x", "sha256": "y", "labels": [{}, 1, 2]}}, "labels of an adapter must be names"),
        ({"adapter": {"name": "x", "sha256": "y", "labels": ["a"]}}, "1 labels for 3 classes"),
    ],
)
def test_tensors_of_another_form_are_refused(tmp_path, changes, message):
    shard = make_shard()
    for name, value in changes.items():
        setattr(shard, name, value)
    save_shard(tmp_path / "a.safetensors", shard, "id")
    with pytest.raises(DataError, match=message):
        load_shard(tmp_path / "a.safetensors")


def test_another_safetensors_file_is_no_shard(tmp_path):
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(DataError, match="not a surrogate shard, labels is missing"):
        load_shard(tmp_path / "a.safetensors")


def test_to_dataset_keeps_labels_and_every_pixel(tmp_path):
    shards = make_folder(tmp_path)
    dataset = SurrogateDataset.from_pretrained(tmp_path).to_dataset()
    assert len(dataset) == 9 and dataset["adapter"][6] == "birds"
    names = dataset.features["label"].names
    assert names[:4] == ["flowers/rose", "flowers/tulip", "flowers/daisy", "birds/class 0"]
    assert [names[label] for label in dataset["label"]][5:8] == ["flowers/daisy", "birds/class 0", "birds/class 1"]
    pixels = torch.cat([shard.pixels for shard in shards])
    for picture, row in zip(dataset["image"], pixels, strict=True):
        assert np.array_equal(np.asarray(picture), row.permute(1, 2, 0).numpy())


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "manifest.json"
    atomic_write(path, b"old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        atomic_write(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["manifest.json"]
