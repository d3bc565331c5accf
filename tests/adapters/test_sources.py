"""Pools of the Hub: what names them, one base model, and what happens to adapters that are no good."""

import json
import threading
import warnings

import pytest
import torch
from helpers_hub import CONFIG, WEIGHTS, publish
from helpers_tiny import save_tiny_backbone
from hub_server import READER_TOKEN
from huggingface_hub import HfApi, constants
from safetensors.torch import load_file, save

from lora_recycle import AdapterPool
from lora_recycle.adapters.sources import AdapterId, adapter_ids
from lora_recycle.backbones.backbone import Backbone
from lora_recycle.errors import AdapterError, ConfigError


CARD = "---\nlibrary_name: peft\nbase_model: org/base\ntags: [birds]\n---\n"


@pytest.fixture
def org(hub, tiny_backbone_path, tiny_pool_path):
    """org/base, and the adapters of `tiny_pool` at org/a to org/d; their commits."""
    hub.put("org/base", tiny_backbone_path)
    return [publish(hub, f"org/{name}", tiny_pool_path / f"adapter-{i}") for i, name in enumerate("abcd")]


def names(*sources, **options):
    return [str(one) for one in adapter_ids(list(sources), **options)]


def test_ids_folders_and_lists_name_adapters_once(tmp_path, tiny_pool_path, monkeypatch):
    (tmp_path / "ids.txt").write_text("# birds\norg/a  # three kinds\n\n org/b@refs/pr/1 \norg/a\npool\n")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pool").symlink_to(tiny_pool_path)
    folders = [f"pool/adapter-{i}" for i in range(4)]
    assert names("org/c@v1", "ids.txt", "./pool/adapter-0") == ["org/c@v1", "org/a", "org/b@refs/pr/1", *folders]
    assert adapter_ids("org/b@refs/pr/1") == [AdapterId("org/b", "refs/pr/1")]
    (tmp_path / "org@home").symlink_to(tiny_pool_path / "adapter-1")
    assert adapter_ids("org@home") == [AdapterId("org@home")]  # a folder that exists goes first


def test_collections_and_searches_name_models(hub):
    hub.page_size = 2
    for name in ("c", "a", "b", "gone"):
        hub.put(f"org/{name}", {"README.md": CARD, CONFIG: "{}"})
    hub.put("org/full", {"README.md": CARD})
    hub.put("org/d", {"x": "y"}, repo_type="dataset")
    hub.put("org/gone", {"README.md": CARD.replace("birds", "trees")})
    api = HfApi()
    slug = api.create_collection("Birds", namespace="org").slug
    for name, kind in (("org/b", "model"), ("org/d", "dataset"), ("org/a", "model")):
        api.add_collection_item(slug, name, kind)
    hub.fail_next("^GET /api/collections/", status=503)
    assert names(f"collection:{slug}") == ["org/b", "org/a"]
    assert names("search:base_model:adapter:org/base, birds") == ["org/a", "org/b", "org/c"]
    hub.make_private("org/b")
    assert names("search:birds,base_model:adapter:org/base", token=READER_TOKEN) == ["org/a", "org/c"]
    hub.put("other/a", {"README.md": CARD, CONFIG: "{}"})
    hub.put("org/whole", {"README.md": CARD.replace("peft", "transformers")})
    assert names("author:org") == ["org/a", "org/b", "org/c", "org/full", "org/gone"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.txt", "^nowhere.txt: no readable list"),
        ("empty.txt", "^empty.txt: names no adapters"),
        ("lists.txt", "^lists.txt: names another file, empty.txt"),
        ("some.safetensors", "^some.safetensors: is a file; name an adapter's folder"),
        ("folder", "^folder: no adapter here"),
        ("org/a@", "^org/a@: no revision after the @"),
        ("collection:org/none", "^collection:org/none: .*404"),
        ("collection:org/hollow", "^collection:org/hollow: no models there"),
        ("search:nobody-has-this-tag", "^search:nobody-has-this-tag: no models there"),
        ("search: ,", "^search: ,: .*no tags to search for"),
        ("author:", "^author:: .*no name"),
        ("author:nobody", "^author:nobody: no models there"),
    ],
)
def test_sources_that_name_nothing_are_errors(hub, tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    hub.collections["org/hollow"] = {"slug": "org/hollow", "title": "Hollow", "items": [], "private": False}
    hub.collections["org/hollow"] |= {"owner": {"name": "org"}, "lastUpdated": hub.tick(), "theme": "green"}
    hub.collections["org/hollow"] |= {"position": 0, "upvotes": 0}
    for name, text in (("empty.txt", "# nothing\n"), ("lists.txt", "org/a\nempty.txt"), ("some.safetensors", "x")):
        (tmp_path / name).write_text(text)
    (tmp_path / "folder").mkdir()
    with pytest.raises(AdapterError, match=message):
        adapter_ids(["org/a", source])


def test_offline_only_the_hub_could_tell(hub, monkeypatch):
    with pytest.raises(AdapterError, match="^search:birds: only the Hub can tell"):
        adapter_ids("search:birds", local_files_only=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(AdapterError, match="^collection:org/a: only the Hub can tell"):
        adapter_ids("collection:org/a")
    assert hub.requests == []


def test_a_pool_from_the_hub_is_the_pool_of_its_folders(hub, org, tiny_pool, tiny_pool_path, tmp_path):
    (tmp_path / "ids.txt").write_text(f"org/b@{org[1]}\norg/c\n")
    folder = tmp_path / "adapter-3"
    folder.mkdir()
    for name, data in hub.files("org/d").items():
        (folder / name).write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # nothing is skipped
        pool = AdapterPool.from_hub(["org/a", tmp_path / "ids.txt", folder], device="cpu")
    assert [info.name for info in pool.infos] == ["org/a", "org/b", "org/c", "adapter-3"]
    assert [info.revision for info in pool.infos] == [*org[:3], None]
    assert (pool.backbone.name, pool.skipped) == ("org/base", [])
    assert pool.backbone.revision == hub.repo("org/base").resolve("main").sha
    pixels = torch.randn(2, 3, 32, 32)
    for i in range(4):
        with pool.folded(i) as pulled, tiny_pool.folded(i) as original, torch.no_grad():
            assert torch.equal(pulled.features(pixels), original.features(pixels))
        assert torch.equal(pool[i].head.weight, tiny_pool[i].head.weight)
    hub.requests.clear()
    again = AdapterPool.from_hub(["org/a", f"org/b@{org[1]}"], local_files_only=True)
    assert (len(again), again.backbone.revision, hub.requests) == (2, pool.backbone.revision, [])


def test_adapters_are_pulled_side_by_side(hub, org):
    together = threading.Barrier(4)  # breaks, and fails the test, where one waits for another's end
    hub.on_request("^GET /api/models/org/[abcd]$", lambda: together.wait(timeout=10), times=4)
    assert len(AdapterPool.from_hub([f"org/{name}" for name in "abcd"])) == 4


@pytest.fixture
def bad(hub, org, tiny_pool_path):
    """Five adapters of which only org/a and org/b are good; what is wrong with the others by their name."""
    hub.corrupt("org/c/.*adapter_model", times=None)
    publish(hub, "org/other", tiny_pool_path / "adapter-0", base="org/elsewhere")
    hub.put("org/d", {WEIGHTS: with_nan(tiny_pool_path / "adapter-3" / WEIGHTS)})
    return ["org/a", "org/absent", "org/c", "org/other", "org/d", "org/b"]


def with_nan(path) -> bytes:
    """A safetensors file whose first floating point tensor is not finite."""
    tensors = load_file(path)
    tensors[min(tensors)].fill_(float("nan"))
    return save(tensors)


def test_bad_adapters_are_skipped_and_told(hub, bad):
    with pytest.warns(UserWarning, match="4 of 6 adapters skipped:\n- org/absent: no such folder or repo"):
        pool = AdapterPool.from_hub(bad, on_error="skip")
    assert [info.name for info in pool.infos] == ["org/a", "org/b"]
    found = {name.split("@")[0]: reason for name, reason in pool.skipped}
    assert list(found) == ["org/absent", "org/c", "org/other", "org/d"]
    for name, part in (("c", "checksum"), ("other", "one base model"), ("d", "NaN"), ("absent", "private repo")):
        assert part in found[f"org/{name}"], found
    with pytest.raises(AdapterError, match="^None of the 2 adapters can be used. org/c: "):
        AdapterPool.from_hub(["org/c", "org/absent"], on_error="skip")


def test_the_first_bad_adapter_stops_the_run(hub, bad):
    hub.delay("models/org/absent", 0.2)  # first by name, not by time
    with pytest.raises(AdapterError, match="^org/absent: no such folder or repo"):
        AdapterPool.from_hub(bad)
    with pytest.raises(AdapterError, match="^org/d.*NaN"):
        AdapterPool.from_hub(["org/a", "org/d"])
    with pytest.raises(ConfigError, match="on_error must be raise or skip, got 'ignore'"):
        AdapterPool.from_hub(bad, on_error="ignore")


def test_adapters_must_agree_on_the_base_and_its_revision(hub, org, tiny_backbone_path, tiny_pool_path):
    first = hub.repo("org/base").resolve("main").sha
    second = hub.put("org/base", {"new": "file"})
    publish(hub, "org/b", tiny_pool_path / "adapter-1", revision="pinned")
    hub.put("org/b", {CONFIG: with_revision(hub, "org/b", first)}, revision="pinned")
    hub.put("org/b", {CONFIG: with_revision(hub, "org/b", "main")})
    assert AdapterPool.from_hub(["org/b@pinned"]).backbone.revision == first
    assert AdapterPool.from_hub(["org/a", "org/b"]).backbone.revision == second  # main, said or not
    message = f"org/a is made for org/base and org/b for org/base@{first}: a pool has one base model"
    with pytest.raises(AdapterError, match=message):
        AdapterPool.from_hub(["org/a", "org/b@pinned"])
    for options in ({"base_revision": first}, {"base_model": "org/base", "base_revision": first}):
        assert AdapterPool.from_hub(["org/a", "org/b@pinned"], **options).backbone.revision == first
    publish(hub, "org/c", tiny_pool_path / "adapter-2", base="org/renamed")
    with pytest.raises(AdapterError, match="org/a is made for org/base and org/c for org/renamed"):
        AdapterPool.from_hub(["org/a", "org/b", "org/c"])
    assert AdapterPool.from_hub(["org/a", "org/c"], tiny_backbone_path).backbone.name == str(tiny_backbone_path)


def with_revision(hub, repo_id: str, revision: str) -> str:
    return json.dumps(json.loads(hub.files(repo_id)[CONFIG]) | {"revision": revision})


def test_a_base_that_moves_is_of_one_commit(hub, tiny_backbone_path, tmp_path):
    first = hub.put("org/base", tiny_backbone_path)
    hub.on_request("model.safetensors", lambda: hub.put("org/base", save_tiny_backbone(tmp_path / "new", seed=7)))
    backbone = Backbone.from_pretrained("org/base", cache_dir=tmp_path / "cache")
    there = Backbone.from_pretrained(tiny_backbone_path).model.state_dict()
    assert backbone.revision == first != hub.repo("org/base").resolve("main").sha
    assert all(torch.equal(value, there[key]) for key, value in backbone.model.state_dict().items())
    assert len(list((tmp_path / "cache").rglob("snapshots/*"))) == 1
