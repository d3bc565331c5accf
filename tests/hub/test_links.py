"""Links of a stranger's folder that lead out of it: no way in passes on what they lead to."""

import os

import pytest
from helpers_tiny import random_pixels

from lora_recycle.adapters.places import find_adapters
from lora_recycle.adapters.pull import pull_adapter
from lora_recycle.cli.main import main
from lora_recycle.errors import AdapterError, DataError
from lora_recycle.hub.licenses import read_license
from lora_recycle.modeling.meta_lora import MetaLoRAForFewShotClassification
from lora_recycle.modeling.publishing import push_adapter_folder, write_adapter
from lora_recycle.surrogate.dataset import SurrogateDataset


FILES = (
    *("adapter_config.json", "adapter_model.safetensors", "README.md"),
    *("meta_lora_config.json", "few_shot_task.safetensors", "surrogate.png"),
)


@pytest.fixture
def folder(hub, model, tmp_path):
    """A meta-LoRA with a task, a card and a picture, whose base is on the Hub."""
    model.fit(random_pixels(4), ["a", "a", "b", "b"]).save_pretrained(tmp_path / "meta")
    return tmp_path / "meta"


def lead_out(path, up=2):
    """The content lies elsewhere, `up` folders higher, and a link leads to it."""
    secret = path.parents[up - 1] / "secret" / path.name
    secret.parent.mkdir(exist_ok=True)
    path.rename(secret)
    path.symlink_to(os.path.relpath(secret, path.parent))


@pytest.mark.parametrize("name", FILES)
def test_a_link_out_of_the_folder_is_refused_on_every_way(folder, hub, tmp_path, name, capsys):
    lead_out(folder / name)
    seen, refused = (
        len(hub.requests),
        f"meta: {name} is a link that leaves the folder, to .*secret.*Put the file itself",
    )
    with pytest.raises(AdapterError, match=refused):
        MetaLoRAForFewShotClassification.from_pretrained(folder)
    with pytest.raises(AdapterError, match=refused):
        write_adapter(pull_adapter(folder), tmp_path / "small", 8)
    with pytest.raises(AdapterError, match=refused):
        push_adapter_folder(folder, "org/new")
    assert main(["quantize", str(folder), "--bits", "32", "--output", str(tmp_path / "small")]) == 1
    told = capsys.readouterr().err
    assert "is a link that leaves" in told and "cp -L" not in told
    assert not (tmp_path / "small").exists() and not hub.exists("org/new")
    assert not [request for request in hub.requests[seen:] if "org/new" in str(request)]


@pytest.mark.parametrize("name", ["README.md", "few_shot_task.safetensors"])
def test_a_link_that_leads_nowhere_yet_is_refused(folder, name):
    (folder / name).unlink()
    (folder / name).symlink_to("../later")
    with pytest.raises(AdapterError, match=f"{name} is a link that leaves"):
        MetaLoRAForFewShotClassification.from_pretrained(folder)


def test_a_link_to_another_file_of_the_folder_is_followed(folder):
    (folder / "README.md").rename(folder / "card.md")
    (folder / "README.md").symlink_to("card.md")
    assert MetaLoRAForFewShotClassification.from_pretrained(folder).label_names == ["a", "b"]


def test_saving_onto_a_folder_does_not_follow_the_link_of_its_card(folder, model):
    lead_out(folder / "README.md")
    secret = (folder / "README.md").read_text()
    with pytest.raises(AdapterError, match="README.md is a link that leaves"):
        model.save_pretrained(folder)
    assert (folder / "README.md").is_symlink() and (folder / "README.md").read_text() == secret


def test_a_folder_that_only_looks_like_a_cache_may_not_link_to_its_neighbours(folder, tmp_path):
    (tmp_path / "clone" / "snapshots").mkdir(parents=True)
    (tmp_path / "clone" / "blobs").mkdir()
    meta = folder.rename(tmp_path / "clone" / "snapshots" / "meta")
    (meta / "README.md").rename(tmp_path / "clone" / "blobs" / "card")
    (meta / "README.md").symlink_to("../../blobs/card")
    with pytest.raises(AdapterError, match="README.md is a link that leaves"):
        pull_adapter(meta)


def test_the_licence_of_a_card_elsewhere_is_not_read(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "README.md").write_text("---\nlicense: mit\n---\n")
    assert read_license(tmp_path / "adapter") == "mit"
    lead_out(tmp_path / "adapter" / "README.md")
    assert read_license(tmp_path / "adapter") is None


def test_an_adapter_of_a_pool_that_lies_elsewhere_is_refused(tiny_pool_path, tmp_path):
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool" / "mine").symlink_to(tiny_pool_path / "adapter-0")
    with pytest.raises(AdapterError, match="pool: mine is a link that leaves the folder, .* name its own folder"):
        find_adapters(tmp_path / "pool")
    (tmp_path / "linked").symlink_to(tiny_pool_path)
    assert len(find_adapters(tmp_path / "linked")) == 4  # the user's own link


@pytest.mark.parametrize("part", ["manifest", "shard", "shards"])
def test_surrogate_data_that_lies_elsewhere_is_refused(tiny_surrogate, tmp_path, hub, part):
    folder = tmp_path / "data"
    (folder / "shards").mkdir(parents=True)
    for path in tiny_surrogate.folder.rglob("*"):
        if path.is_file():
            (folder / path.relative_to(tiny_surrogate.folder)).write_bytes(path.read_bytes())
    first = folder / tiny_surrogate.manifest["shards"][0]["file"]
    paths = {"manifest": folder / "manifest.json", "shard": first, "shards": folder / "shards"}
    lead_out(paths[part], 3 if part == "shard" else 2)
    with pytest.raises(
        DataError, match=f"{'manifest.json' if part == 'manifest' else first.name} is a link that leav"
    ):
        data = SurrogateDataset.from_pretrained(folder)
        assert part != "manifest"
        data.push_to_hub("org/data")
    assert not hub.exists("org/data")
