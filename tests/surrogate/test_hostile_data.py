"""Surrogate data whose checksums are right and whose content is not, as a hostile author would make it."""

import shutil

import pytest
import torch
from helpers_surrogate import edit, replace_shard

from lora_recycle.distillation.surrogate_images import match_shards
from lora_recycle.errors import DataError
from lora_recycle.hub.cards import surrogate_card
from lora_recycle.surrogate.dataset import MANIFEST, Shard, SurrogateDataset


@pytest.fixture
def folder(tiny_surrogate, tmp_path):
    """A copy of `tiny_surrogate`."""
    return shutil.copytree(tiny_surrogate.folder, tmp_path / "surrogate")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("num_images", value) for value in (10**9, -5, 0, 1e30, True, 10**400, "6", None)),
        *(("accuracy", value) for value in (-0.1, 2, True, "1", 10**400)),
        *(("confidence", value) for value in (1.5, None, [])),
    ],
)
def test_numbers_of_the_manifest(folder, key, value):
    edit(folder, lambda manifest: manifest["shards"][1].update({key: value}))
    with pytest.raises(DataError, match=f"no readable manifest.json .{key} of a shard is "):
        SurrogateDataset.from_pretrained(folder)


def test_another_number_of_images_than_there_are(folder):
    edit(folder, lambda manifest: manifest["shards"][1].update(num_images=7))
    with pytest.raises(DataError, match="holds 24 images, not 7 as manifest.json says"):
        SurrogateDataset.from_pretrained(folder).shard(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["shards"][0]["adapter"].update(license=["mit"]), "license of an adapter must be a string"),
        (lambda m: m["shards"][0]["adapter"].update(license="a\nb: c"), "license of an adapter is"),
        (lambda m: m["shards"][0]["adapter"].update(revision=7), "revision of an adapter must be a string"),
        (lambda m: m["config"].update(starts=["noise"]), "starts must map kinds of images to shares"),
        (lambda m: m["config"].update(starts={"noise": "all"}), "starts must map kinds of images to shares"),
        (lambda m: m["config"].update(starts={"noise": 10**400}), "starts must map kinds of images to shares"),
        (lambda m: m["config"].update(iterations={}), "iterations is {}"),
        (lambda m: m.update(backbone={"name": ["x"]}), "name of the backbone must be a string"),
        (lambda m: m.update(backbone={"name": "x" * 5000}), "name of the backbone is no name of a folder or a repo"),
    ],
)
def test_odd_types_that_a_card_would_tell(folder, change, message):
    edit(folder, change)
    with pytest.raises(DataError, match=message):
        SurrogateDataset.from_pretrained(folder)


def test_json_that_is_nested_deeply(folder):
    (folder / MANIFEST).write_text('{"shards": ' + "[" * 500 + "]" * 500 + "}")
    with pytest.raises(DataError, match="nested too deeply"):
        SurrogateDataset.from_pretrained(folder)


def test_masks_of_patches_that_the_backbone_has_not(folder, tiny_pool):
    replace_shard(folder, 2, lambda shard: shard.kept_tokens.fill_(99))  # of 1024 pixels, so it may be a patch
    with pytest.raises(DataError, match="kept_tokens names patch 99, but .* has the patches 0 to 15"):
        match_shards(tiny_pool, SurrogateDataset.from_pretrained(folder))
    assert len(match_shards(tiny_pool, SurrogateDataset.from_pretrained(folder), use_masks=False)) == 96
    with pytest.raises(DataError, match="kept_tokens must lie in 0 to 1023, got 5000 to 5000"):
        replace_shard(folder, 2, lambda shard: shard.kept_tokens.fill_(5000))
        SurrogateDataset.from_pretrained(folder).shard(2)


def resized(shard: Shard) -> None:
    shard.pixels = torch.zeros(len(shard), 3, 16, 16, dtype=torch.uint8)


def narrower(shard: Shard) -> None:
    shard.teacher_features = shard.teacher_features[:, :5]


def fewer_patches(shard: Shard) -> None:
    shard.kept_tokens = shard.kept_tokens[:, :3]


@pytest.mark.parametrize(
    ("change", "name"), [(resized, "pixels"), (narrower, "teacher_features"), (fewer_patches, "kept_tokens")]
)
def test_shards_of_different_sizes(folder, tiny_pool, change, name):
    replace_shard(folder, 3, change)
    data = SurrogateDataset.from_pretrained(folder)
    for use in (lambda: match_shards(tiny_pool, data), lambda: data.sample(8)):
        with pytest.raises(DataError, match=rf"0003.*: {name} of an image has the shape .*, but .* in 0000"):
            use()


def test_images_of_another_size_than_the_backbone_takes(folder, tiny_pool):
    for number in range(4):
        replace_shard(folder, number, resized)
    with pytest.raises(DataError, match="its images have 16 x 16 pixels, but .* takes 32 x 32"):
        match_shards(tiny_pool, SurrogateDataset.from_pretrained(folder))


def test_two_classes_of_one_name(folder):
    replace_shard(folder, 0, lambda shard: shard.adapter.update(labels=["cat", "cat", "cat (1)", "dog"]))
    replace_shard(folder, 1, lambda shard: shard.adapter.update(name="adapter-0", labels=["cat", "b", "c", "dog"]))
    data = SurrogateDataset.from_pretrained(folder)
    names = data.to_dataset().features["label"].names
    assert names[:4] == [f"adapter-0/{name}" for name in ("cat (2)", "cat (3)", "cat (1)", "dog (1)")]
    assert len(set(names)) == len(names) == 16
    assert "adapter-0" in surrogate_card("org/data", data.manifest)
