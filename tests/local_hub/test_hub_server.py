"""The local Hub is faithful enough for the real clients, and misbehaves as ordered."""

import time

import httpx2
import huggingface_hub
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Image, Value, load_dataset
from helpers_adapters import headless_twin, save_adapter, tiny_classifier
from hub_server import READER_TOKEN
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from peft import PeftModel
from safetensors.torch import load_file, save


api = HfApi()
WEIGHTS = save({"a": torch.arange(5000.0)})
CARD = "---\nlibrary_name: peft\nbase_model: org/base\nlicense: mit\ntags: [digits]\n---\n# Card\n"


def one_file(**options) -> bytes:
    with open(hf_hub_download("org/a", "a.safetensors", **options), "rb") as file:
        return file.read()


def test_upload_and_snapshot_at_a_commit(hub, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "README.md").write_text(CARD)
    (tmp_path / "sub" / "w.safetensors").write_bytes(WEIGHTS)
    assert api.create_repo("org/a") == f"{hub.endpoint}/org/a"
    sha = api.upload_folder(repo_id="org/a", folder_path=tmp_path).oid
    folder = snapshot_download("org/a", revision=sha)
    assert folder.endswith(sha)
    assert torch.equal(load_file(f"{folder}/sub/w.safetensors")["a"], torch.arange(5000.0))
    assert hub.files("org/a") == {path: hub.files("org/a", sha)[path] for path in api.list_repo_files("org/a")}
    assert [file.lfs is not None for file in api.get_paths_info("org/a", ["README.md", "sub/w.safetensors"])] == [0, 1]
    assert hub.count(r"^PUT /lfs/org/a/") == 1
    api.upload_folder(repo_id="org/a", folder_path=tmp_path)  # unchanged: no commit, no upload
    assert (hub.count("^PUT "), len(hub.repo("org/a").commits)) == (1, 2)


def test_old_revisions_branches_and_pull_requests(hub):
    first = hub.put("org/a", {"a.txt": "one", "b.txt": "b"})
    second = api.create_commit(
        "org/a",
        [CommitOperationAdd("a.txt", b"two"), CommitOperationDelete("b.txt")],
        commit_message="two",
        parent_commit=first,
    )
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit("org/a", [CommitOperationAdd("c", b"")], commit_message="late", parent_commit=first)
    api.create_branch("org/a", branch="old", revision=first)
    api.create_tag("org/a", tag="v1", revision=second.oid)
    proposal = api.upload_file(path_or_fileobj=b"three", path_in_repo="a.txt", repo_id="org/a", create_pr=True)
    assert proposal.pr_num == 1

    def text(revision):
        with open(hf_hub_download("org/a", "a.txt", revision=revision)) as file:
            return file.read()

    revisions = [first, first[:8], "old", "v1", "main", None, "refs/pr/1"]
    assert [text(revision) for revision in revisions] == ["one", "one", "one", "two", "two", "two", "three"]
    found = api.list_repo_refs("org/a", include_pull_requests=True)
    assert {ref.name: ref.target_commit for ref in found.branches} == {"main": second.oid, "old": first}
    assert [commit.commit_id for commit in api.list_repo_commits("org/a")][:2] == [second.oid, first]
    with pytest.raises(RevisionNotFoundError):
        text("absent")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("org/a", "b.txt")


def test_repos_are_created_once_and_deleted(hub):
    api.create_repo("org/d", repo_type="dataset", private=True)
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("org/d", repo_type="dataset")
    api.create_repo("org/d", repo_type="dataset", exist_ok=True)
    assert api.repo_info("org/d", repo_type="dataset").private
    with pytest.raises(HfHubHTTPError, match="403"):
        api.create_repo("org/x", token=READER_TOKEN)
    assert api.create_repo("mine", token=READER_TOKEN).repo_id == "reader/mine"
    api.delete_repo("org/d", repo_type="dataset")
    assert not hub.exists("org/d", repo_type="dataset")
    with pytest.raises(RepositoryNotFoundError):
        snapshot_download("org/d", repo_type="dataset")
    with pytest.raises(ValueError, match="license"):
        api.upload_file(path_or_fileobj=b"---\nlicense: ours\n---\n", path_in_repo="README.md", repo_id="reader/mine")


def test_searches_and_collections(hub):
    hub.page_size = 2
    for name in ("a", "b", "c"):
        hub.put(f"org/{name}", {"README.md": CARD, "adapter_config.json": "{}", "x/y": "", "z": ""})
    hub.put("org/other", {"README.md": "# nothing"})
    found = [info.id for info in api.list_models(filter="base_model:adapter:org/base")]
    assert found == ["org/c", "org/b", "org/a"]
    assert [info.id for info in api.list_models(filter=["peft", "digits"], search="B", limit=5)] == ["org/b"]
    info = api.model_info("org/a")
    assert (info.card_data.base_model, info.library_name) == ("org/base", "peft")
    paths = [entry.path for entry in api.list_repo_tree("org/a", recursive=True, expand=True)]
    assert paths == [".gitattributes", "README.md", "adapter_config.json", "x", "x/y", "z"]
    slug = api.create_collection("Digits of all", namespace="org").slug
    api.add_collection_item(slug, "org/b", "model")
    api.add_collection_item(slug, "org/a", "model", note="good")
    items = api.get_collection(slug).items
    assert [(item.item_id, item.item_type, item.note) for item in items] == [
        ("org/b", "model", None),
        ("org/a", "model", "good"),
    ]


def test_peft_loads_an_adapter(hub, tmp_path):
    model, _ = save_adapter(tmp_path)
    hub.put("org/adapter", tmp_path)
    pulled = PeftModel.from_pretrained(tiny_classifier(), "org/adapter").eval()
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(pulled(pixels).logits, model(pixels).logits)
        assert not torch.allclose(headless_twin(tiny_classifier())(pixels)[0], pulled.base_model.vit(pixels)[0])


def test_datasets_push_and_load(hub):
    image = {"bytes": WEIGHTS[:50], "path": "0.png"}
    rows = {"image": [image] * 3, "name": ["x", "y", "z"]}
    features = Features({"image": Image(decode=False), "name": Value("string")})
    commit = DatasetDict({"train": Dataset.from_dict(rows, features=features)}).push_to_hub("org/d")
    assert commit.oid == hub.repo("org/d", repo_type="dataset").resolve("main").sha
    loaded = load_dataset("org/d", split="train")
    assert loaded["name"][:] == ["x", "y", "z"]
    assert loaded.features == features
    assert loaded[2]["image"]["bytes"] == WEIGHTS[:50]


def test_gated_and_private(hub):
    hub.put("org/a", {"a.safetensors": WEIGHTS})
    hub.gate("org/a")
    for token, status in ((False, 401), (READER_TOKEN, 403)):
        assert "a.safetensors" in api.list_repo_files("org/a", token=token)  # what it holds is no secret
        with pytest.raises(GatedRepoError) as error:
            one_file(token=token)
        assert error.value.response.status_code == status
    hub.make_private("org/a")
    for token, status in ((False, 401), (READER_TOKEN, 404)):
        with pytest.raises(RepositoryNotFoundError) as error:
            api.model_info("org/a", token=token)
        assert error.value.response.status_code == status
    assert list(api.list_models(token=False)) == []
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        api.model_info("org/a", token="hf_of_nobody")
    assert one_file() == WEIGHTS


def test_errors_are_retried(hub):
    hub.put("org/a", {"a.safetensors": WEIGHTS})
    hub.fail_next("^GET .*a.safetensors", status=429, retry_after=0, times=2)
    hub.fail_next("^HEAD ", status=503)
    start = time.monotonic()
    assert one_file() == WEIGHTS
    assert time.monotonic() - start < 1
    assert (hub.count("^HEAD "), hub.count("^GET ")) == (2, 3)
    hub.fail_next("^HEAD ", times=None)
    with pytest.raises(LocalEntryNotFoundError, match="connection"):
        one_file(revision="refs/heads/main")


def test_cut_downloads_are_resumed_or_leave_nothing(hub, tmp_path):
    hub.put("org/a", {"a.safetensors": WEIGHTS})
    hub.cut_download("a.safetensors", after_bytes=700)
    assert one_file(cache_dir=tmp_path / "one") == WEIGHTS
    assert hub.count("^GET ") == 2
    hub.cut_download("a.safetensors", times=None)
    with pytest.raises(httpx2.RemoteProtocolError):
        one_file(cache_dir=tmp_path / "two")
    assert not [path for path in (tmp_path / "two").rglob("blobs/*") if path.is_file()]


def test_cut_uploads_leave_the_repo_as_it_was(hub):
    before = hub.put("org/a", {"b": "b"})
    upload = {"path_or_fileobj": WEIGHTS, "path_in_repo": "a.safetensors", "repo_id": "org/a"}
    hub.cut_upload("^PUT /lfs/", after_bytes=100, times=None)
    with pytest.raises(RuntimeError, match="Error while uploading 'a.safetensors'"):
        api.upload_file(**upload)
    assert hub.count("^PUT ") == 6
    assert hub.repo("org/a").lfs == {} and hub.repo("org/a").resolve("main").sha == before


def test_a_commit_may_be_lost_on_the_way_back(hub):
    hub.put("org/a", {"b": "b"})
    upload = {"path_or_fileobj": WEIGHTS, "path_in_repo": "a.safetensors", "repo_id": "org/a"}
    hub.cut_upload("POST .*/commit/", after_bytes=10)
    with pytest.raises(httpx2.TransportError):
        api.upload_file(**upload)
    assert "a.safetensors" not in hub.files("org/a")
    hub.cut_download("POST .*/commit/")
    with pytest.raises(httpx2.RemoteProtocolError):
        api.upload_file(**upload)
    assert hub.files("org/a")["a.safetensors"] == WEIGHTS


def test_corruption_keeps_the_size(hub, tmp_path):
    hub.put("org/a", {"a.safetensors": WEIGHTS})
    hub.corrupt("a.safetensors")
    wrong = one_file(cache_dir=tmp_path / "one")
    assert (len(wrong), wrong[:-1], wrong == WEIGHTS) == (len(WEIGHTS), WEIGHTS[:-1], False)
    assert one_file(cache_dir=tmp_path / "two") == WEIGHTS


def test_a_repo_moves_between_two_requests(hub):
    first = hub.put("org/a", {"a.txt": "one"})
    hub.on_request("^HEAD ", lambda: hub.put("org/a", {"a.txt": "two"}))
    with open(f"{snapshot_download('org/a')}/a.txt") as file:
        assert file.read() == "one"
    assert hub.repo("org/a").resolve("main").parent == first


def test_a_slow_answer_times_out(hub, monkeypatch):
    hub.put("org/a", {"a.safetensors": WEIGHTS})
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    hub.delay("^GET .*a.safetensors", seconds=0.5)
    assert one_file() == WEIGHTS  # at the second attempt
    assert hub.count("^GET ") == 2
