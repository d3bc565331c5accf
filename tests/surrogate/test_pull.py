"""Surrogate data pulled from a Hub that misbehaves: whole, of one commit, with the stated bytes, or not at all."""

import json
import threading

import pytest
import torch
from helpers_hub import cached
from hub_faults import Faults
from hub_server import READER_TOKEN
from huggingface_hub import constants, snapshot_download
from huggingface_hub.utils import enable_progress_bars

from lora_recycle import SurrogateDataset
from lora_recycle.errors import DataError


INFO = r"^GET /api/datasets/org/s($|/revision)"
REPO = {"repo_type": "dataset"}


@pytest.fixture
def org_s(hub, tiny_surrogate):
    """Commit of `tiny_surrogate` at org/s."""
    return hub.put("org/s", tiny_surrogate.folder, **REPO)


@pytest.fixture
def shard(tiny_surrogate):
    """Path in the repo of the second shard."""
    return tiny_surrogate.manifest["shards"][1]["file"]


def shorter(tiny_surrogate) -> dict[str, str | None]:
    """What a later commit changes: the last shard is gone."""
    manifest = json.loads((tiny_surrogate.folder / "manifest.json").read_text())
    gone = manifest["shards"].pop()["file"]
    return {"manifest.json": json.dumps(manifest), gone: None}


def pull(tmp_path, **options) -> SurrogateDataset:
    return SurrogateDataset.from_pretrained("org/s", cache_dir=tmp_path, **options)


def same(one: SurrogateDataset, other: SurrogateDataset) -> bool:
    shards = [(one.shard(i, verify=True), other.shard(i)) for i in range(other.num_shards)]
    return one.num_shards == other.num_shards and all(torch.equal(a.pixels, b.pixels) for a, b in shards)


@pytest.mark.parametrize("moment", [INFO, "GET .*/tree/", "^HEAD .*manifest", "^GET .*safetensors"])
def test_a_repo_that_moves_gives_the_files_of_one_commit(hub, org_s, tiny_surrogate, moment, tmp_path):
    hub.on_request(moment, lambda: hub.put("org/s", shorter(tiny_surrogate), **REPO))
    pulled = pull(tmp_path)
    assert pulled.num_shards == (3 if moment == INFO else 4)  # the first answer decides
    assert (pulled.folder.name == org_s) == (moment != INFO)
    assert all(len(pulled.shard(i, verify=True)) for i in range(pulled.num_shards))
    assert pull(tmp_path).num_shards == 3 and same(pull(tmp_path, revision=org_s), tiny_surrogate)


def test_a_cut_download_goes_on_or_leaves_nothing(hub, org_s, tiny_surrogate, shard, tmp_path):
    hub.cut_download(shard, after_bytes=700)
    assert same(pull(tmp_path / "one"), tiny_surrogate)
    hub.cut_download(shard, times=None)
    with pytest.raises(DataError, match="^org/s: the download failed"):
        pull(tmp_path / "two")
    with pytest.raises(DataError, match="^org/s: only a part of it is in the local cache"):
        pull(tmp_path / "two", local_files_only=True)
    hub.faults = Faults()
    assert same(pull(tmp_path / "two"), tiny_surrogate)


@pytest.mark.parametrize("links", [True, False])
def test_wrong_bytes_are_fetched_again_and_then_refused(
    hub, org_s, tiny_surrogate, shard, links, tmp_path, monkeypatch
):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", not links)
    hub.corrupt(f"^GET .*{shard}")
    assert same(pull(tmp_path / "one"), tiny_surrogate)
    hub.corrupt(f"^GET .*{shard}", times=None)
    with pytest.raises(DataError, match=f"^org/s: {shard} of commit {org_s} has not the checksum .*fetched again"):
        pull(tmp_path / "two")
    assert cached(tmp_path / "two", shard) == []


def test_busy_gated_and_unknown(hub, org_s, tiny_surrogate, tmp_path):
    hub.fail_next(INFO, status=429, retry_after=3)
    hub.fail_next("^GET .*safetensors", status=503)
    assert same(pull(tmp_path), tiny_surrogate)
    hub.gate("org/s", **REPO)
    with pytest.raises(DataError, match="^org/s: gated; accept its terms"):
        pull(tmp_path / "other", token=READER_TOKEN)
    with pytest.raises(DataError, match="^org/s@v9: the repo has no such revision"):
        pull(tmp_path, revision="v9")
    with pytest.raises(DataError, match="^org/none: no such folder or repo"):
        SurrogateDataset.from_pretrained("org/none", cache_dir=tmp_path)


def test_what_is_cached_needs_no_hub(hub, org_s, tiny_surrogate, tmp_path):
    pull(tmp_path)
    hub.requests.clear()
    assert same(pull(tmp_path, revision=org_s), tiny_surrogate)
    assert same(pull(tmp_path, local_files_only=True), tiny_surrogate)
    assert hub.requests == []


def test_shards_come_side_by_side(hub, org_s, tiny_surrogate, tmp_path):
    together = threading.Barrier(4)  # breaks, and fails the test, where one shard waits for another's end
    hub.on_request("^GET .*safetensors", lambda: together.wait(timeout=10), times=4)
    assert same(pull(tmp_path), tiny_surrogate)


def test_progress_is_shown_unless_told_otherwise(hub, org_s, tmp_path, capfd):
    enable_progress_bars()  # an earlier command with --quiet took them away
    pull(tmp_path / "one", progress=False)
    assert capfd.readouterr().err == ""
    pull(tmp_path / "two")
    assert "Fetching 5 files" in capfd.readouterr().err


def test_what_is_too_large_or_leads_out_of_the_repo_is_not_fetched(hub, org_s, shard, tmp_path):
    repo = hub.repo("org/s", **REPO)
    for name in (shard, "manifest.json", "README.md"):
        sha = hub.put("org/s", {"README.md": f"# {name}"}, **REPO)
        repo.claimed_sizes = {name: 2**40}
        with pytest.raises(DataError, match=f"^org/s@{sha}: {name} has {2**40} bytes, more than .* nothing was down"):
            pull(tmp_path)
    repo.claimed_sizes = {}
    sha = hub.put("org/s", {"shards/../../../out.safetensors": b"x"}, **REPO)
    with pytest.raises(DataError, match=f"^org/s@{sha}: 'shards/../../../out.safetensors' leads out of the repo"):
        pull(tmp_path)
    assert hub.count("/resolve/|/cdn/") == 0 and not list(tmp_path.rglob("*.safetensors"))


def test_other_files_of_the_repo_stay_there(hub, org_s, tmp_path):
    hub.put("org/s", {"code.py": "print()", "shards/extra.bin": b"pickle", "data/train.parquet": b"rows"}, **REPO)
    names = {path.relative_to(folder).as_posix() for folder in [pull(tmp_path).folder] for path in folder.rglob("*.*")}
    assert names == {"manifest.json", *(name for name in hub.files("org/s", **REPO) if name.endswith(".safetensors"))}
    snapshot_download("org/s", cache_dir=tmp_path, **REPO)  # by another program, all of it
    assert pull(tmp_path).num_shards == 4
