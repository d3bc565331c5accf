"""Adapters pulled from a Hub that misbehaves: never half of one, never two commits of one, never wrong bytes."""

import errno
import hashlib
import os
import pathlib
from types import SimpleNamespace

import huggingface_hub
import pytest
from helpers_adapters import save_adapter
from helpers_hub import CONFIG, WEIGHTS, cached, publish
from hub_faults import Faults
from hub_server import READER_TOKEN
from huggingface_hub import constants, hf_hub_download, snapshot_download

from lora_recycle.adapters.pull import pull_adapter
from lora_recycle.errors import AdapterError
from lora_recycle.hub import download


INFO = r"^GET /api/models/org/a($|/revision)"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two adapters, of rank 4 and 2."""
    from peft import LoraConfig

    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    save_adapter(one)
    save_adapter(two, LoraConfig(r=2, target_modules=["fc1"], modules_to_save=["classifier"]))
    return one, two


@pytest.fixture
def org_a(hub, folders):
    """Commit of the adapter of rank 4 at org/a."""
    return publish(hub, "org/a", folders[0])


def sha256(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "moment", [INFO, "GET .*/tree/", "^HEAD .*config", "^HEAD .*safetensors", "^GET .*safetensors"]
)
def test_a_repo_that_moves_gives_the_files_of_one_commit(hub, org_a, folders, moment, tmp_path):
    hub.on_request(moment, lambda: publish(hub, "org/a", folders[1]))
    info = pull_adapter("org/a", cache_dir=tmp_path)  # the client remembers listings of a cache that is gone
    rank, folder = (2, folders[1]) if moment == INFO else (4, folders[0])  # the first answer decides
    assert (info.revision == org_a) == (rank == 4)
    assert (info.rank, info.config["r"], info.sha256) == (rank, rank, sha256(folder / WEIGHTS))
    assert (pull_adapter("org/a").rank, pull_adapter("org/a", org_a).rank) == (2, 4)
    assert len(hub.repo("org/a").commits) == 3


def test_a_cached_adapter_costs_one_request_or_none(hub, org_a):
    pull_adapter("org/a")
    hub.requests.clear()
    assert pull_adapter("org/a").revision == org_a
    assert len(hub.requests) == 1 and hub.count(INFO) == 1
    assert pull_adapter("org/a", org_a).revision == org_a and len(hub.requests) == 1


def test_only_the_files_of_an_adapter_are_fetched(hub, org_a):
    hub.put("org/a", {"adapter_model.bin": b"pickle", "code.py": "print()", "sub/adapter_config.json": "{}"})
    folder = pull_adapter("org/a").path
    assert {path.name for path in folder.iterdir()} == {CONFIG, WEIGHTS, "README.md"}


@pytest.mark.parametrize(
    ("name", "size"),
    [(WEIGHTS, 2**33 + 1), (CONFIG, 2**24), ("README.md", 2**24), ("meta_lora_config.json", 2**40)]
    + [("surrogate.png", 2**24)],
)
def test_a_file_of_absurd_size_is_refused_before_a_byte_is_fetched(hub, org_a, tmp_path, name, size):
    sha = hub.put("org/a", {"meta_lora_config.json": "{}", "surrogate.png": b"png"})
    hub.repo("org/a").claimed_sizes[name] = size
    for revision in (None, sha):
        with pytest.raises(
            AdapterError, match=f"^org/a@{sha}: {name} has {size} bytes, more than .* nothing was down"
        ):
            pull_adapter("org/a", revision, cache_dir=tmp_path)
    assert hub.count("/resolve/|/cdn/") == 0 and not list(tmp_path.rglob("blobs")) + list(tmp_path.rglob("snapshots"))
    del hub.repo("org/a").claimed_sizes[name]
    assert pull_adapter("org/a", cache_dir=tmp_path).revision == sha


def test_sizes_are_looked_at_where_another_program_has_listed_the_repo(hub, org_a, tmp_path):
    hub.repo("org/a").claimed_sizes[WEIGHTS] = 2**40
    snapshot_download("org/a", allow_patterns=["README.md"], cache_dir=tmp_path)
    with pytest.raises(AdapterError, match=f"^org/a@{org_a}: {WEIGHTS} has {2**40} bytes"):
        pull_adapter("org/a", cache_dir=tmp_path)
    assert hub.count(f"{WEIGHTS}") == 0


def test_what_is_cached_is_used_where_sizes_cannot_be_asked_for(hub, org_a, tmp_path):
    for name in (CONFIG, WEIGHTS):
        hf_hub_download("org/a", name, cache_dir=tmp_path)
    hub.fail_next("GET .*/tree/", status=503, times=None)
    assert pull_adapter("org/a", cache_dir=tmp_path).revision == org_a
    with pytest.raises(AdapterError, match="^org/a: the Hub answers 503"):
        pull_adapter("org/a", cache_dir=tmp_path / "empty")


def test_a_cut_download_goes_on_or_leaves_nothing(hub, org_a, folders, tmp_path):
    hub.cut_download(WEIGHTS, after_bytes=700)
    assert pull_adapter("org/a", cache_dir=tmp_path / "one").sha256 == sha256(folders[0] / WEIGHTS)
    hub.cut_download(WEIGHTS, times=None)
    hub.put("org/a", {WEIGHTS: (folders[1] / WEIGHTS).read_bytes()})
    with pytest.raises(AdapterError, match="org/a: the download failed"):
        pull_adapter("org/a", cache_dir=tmp_path / "one")
    with pytest.raises(AdapterError, match="org/a: only a part of it is in the local cache.*without local_files_only"):
        pull_adapter("org/a", cache_dir=tmp_path / "one", local_files_only=True)
    hub.faults = Faults()
    assert pull_adapter("org/a", cache_dir=tmp_path / "one").sha256 == sha256(folders[1] / WEIGHTS)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, "README.md"])
@pytest.mark.parametrize("links", [True, False])
def test_wrong_bytes_are_fetched_again_and_then_refused(hub, org_a, folders, tmp_path, name, links, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", not links)
    hub.corrupt(f"^GET .*{name}")
    info = pull_adapter("org/a", cache_dir=tmp_path / "one")
    assert (info.path / name).is_symlink() == links
    assert (info.path / name).read_bytes() == hub.files("org/a")[name]
    hub.corrupt(f"^GET .*{name}", times=None)
    with pytest.raises(AdapterError, match=f"org/a: {name} of commit {org_a} has not the checksum .*fetched again"):
        pull_adapter("org/a", cache_dir=tmp_path / "two")
    assert cached(tmp_path / "two", name) == []
    blobs = {path.stat().st_size for path in (tmp_path / "two").rglob("blobs/*")}
    assert len(hub.files("org/a")[name]) not in blobs and len(blobs) == (2 if links else 0)


def test_wrong_bytes_that_another_program_cached_are_not_used(hub, org_a, tmp_path):
    hub.corrupt(f"^GET .*{WEIGHTS}")
    hf_hub_download("org/a", WEIGHTS, cache_dir=tmp_path)
    for name in (CONFIG, "README.md"):
        hf_hub_download("org/a", name, cache_dir=tmp_path)
    with pytest.raises(AdapterError, match=f"org/a: {WEIGHTS} of commit {org_a} has not the checksum"):
        pull_adapter("org/a", cache_dir=tmp_path, local_files_only=True)
    assert cached(tmp_path, WEIGHTS) == []
    assert pull_adapter("org/a", cache_dir=tmp_path).revision == org_a


def test_gated_private_and_refused(hub, org_a, tmp_path, monkeypatch):
    hub.gate("org/a")
    for token in (False, READER_TOKEN):
        with pytest.raises(AdapterError, match="^org/a: gated; accept its terms on the Hub and pass a token"):
            pull_adapter("org/a", token=token, cache_dir=tmp_path)
    hub.make_private("org/a")
    for token in (False, READER_TOKEN):
        with pytest.raises(AdapterError, match="^org/a: no such folder or repo .a private repo needs a token"):
            pull_adapter("org/a", token=token, cache_dir=tmp_path)
    with pytest.raises(AdapterError, match="^org/a@main: the Hub does not accept the token .401 Invalid credentials"):
        pull_adapter("org/a", "main", token="hf_of_nobody")
    with pytest.raises(AdapterError, match="^org/a@v2: the repo has no such revision"):
        pull_adapter("org/a", "v2")
    assert pull_adapter("org/a").revision == org_a  # HF_TOKEN is the owner's
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(AdapterError, match="private repo"):
        pull_adapter("org/a", cache_dir=tmp_path)


def test_a_busy_hub_is_asked_again_when_it_says(hub, org_a, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(download, "time", SimpleNamespace(sleep=waits.append))
    hub.fail_next(INFO, status=429, retry_after=7, times=2)
    hub.fail_next(INFO, status=503)
    hub.fail_next("GET .*/tree/", status=503)  # this and the next are the client's to repeat
    hub.fail_next(f"^GET .*{WEIGHTS}", status=429, retry_after=1)
    assert pull_adapter("org/a", cache_dir=tmp_path).revision == org_a
    # the listing: once in vain, once for the sizes, once by `snapshot_download`
    assert (waits, hub.count(INFO), hub.count("tree/"), hub.count(f"^GET .*{WEIGHTS}")) == ([7, 7, 4], 4, 3, 2)


def test_a_hub_that_stays_busy_is_told(hub, org_a, tmp_path, monkeypatch):
    hub.fail_next(INFO, status=429, times=4)
    with pytest.raises(AdapterError, match="^org/a: the Hub answers 429"):
        pull_adapter("org/a")
    hub.fail_next(INFO, status=503, times=4)
    with pytest.raises(AdapterError, match="^org/a: no such folder or repo in the local cache, and the Hub.*503"):
        pull_adapter("org/a")
    assert hub.count("") == 8
    pull_adapter("org/a")
    hub.fail_next(INFO, status=503)  # as in transformers: what is there is used
    assert pull_adapter("org/a").revision == org_a


def test_a_slow_hub_is_waited_for_as_long_as_the_client_does(hub, org_a, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    hub.delay(f"^GET .*{WEIGHTS}", seconds=1)
    hub.delay(INFO, seconds=0.1)
    assert pull_adapter("org/a").revision == org_a
    assert hub.count(f"^GET .*{WEIGHTS}") >= 2  # more where this machine is slow itself


def test_offline_the_cache_is_used_and_the_hub_left_alone(hub, org_a, monkeypatch):
    pull_adapter("org/a")
    hub.requests.clear()
    assert pull_adapter("org/a", local_files_only=True).revision == org_a
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert pull_adapter("org/a").revision == org_a
    with pytest.raises(
        AdapterError, match="^org/b: no such folder or repo in the local cache.*without HF_HUB_OFFLINE"
    ):
        pull_adapter("org/b")
    assert hub.requests == []


@pytest.mark.parametrize("stated", [10**12, "9" * 5000, 301])
def test_a_hub_that_asks_for_ages_is_not_waited_for(hub, org_a, tmp_path, monkeypatch, stated):
    waits = []
    for module in (download, huggingface_hub.utils._http):
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=waits.append))
    hub.fail_next(INFO, status=429, retry_after=stated)  # ours to repeat
    hub.fail_next("GET .*/tree/", status=429, retry_after=stated)  # the client's
    hub.fail_next(f"^GET .*{WEIGHTS}", status=503, retry_after=stated)
    assert pull_adapter("org/a", cache_dir=tmp_path).revision == org_a
    assert waits and max(waits) <= 60


def test_a_hub_that_asks_for_minutes_is_waited_for():
    response = SimpleNamespace(headers={"Retry-After": "300", "RateLimit": '"api";r=0;t=299'})
    download._drop_long_waits(response)
    assert len(response.headers) == 2
    response.headers["RateLimit"] = '"api";r=0;t=99999'
    download._drop_long_waits(response)
    assert list(response.headers) == ["Retry-After"]


def test_a_cache_that_is_read_only(hub, org_a, tmp_path, monkeypatch):
    pull_adapter("org/a", cache_dir=tmp_path / "full")
    refused = PermissionError(errno.EROFS, "Read-only file system", str(tmp_path))

    def refuse(*names, **options):
        raise refused

    for name in ("mkdir", "makedirs", "replace", "rename", "symlink"):  # root may write anywhere
        monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr(pathlib.Path, "mkdir", refuse)
    with pytest.raises(AdapterError, match="^org/a: .*[Rr]ead-only"):
        pull_adapter("org/a", cache_dir=tmp_path / "empty")
    assert pull_adapter("org/a", cache_dir=tmp_path / "full", local_files_only=True).revision == org_a
    assert pull_adapter("org/a", cache_dir=tmp_path / "full").revision == org_a
