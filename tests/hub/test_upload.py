"""Push with the real client: one commit with all of it or nothing, cards that tell the truth, round trips."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from datasets import ClassLabel, load_dataset
from datasets import Image as ImageFeature
from helpers_tiny import random_pixels
from hub_server import READER_TOKEN
from huggingface_hub import HfApi, ModelCard
from PIL import Image

from lora_recycle import AdapterError, MetaLoRAForFewShotClassification, PushError, SurrogateDataset
from lora_recycle.cli.main import main
from lora_recycle.hub.upload import push_files


PEFT_FILES = {"adapter_config.json", "adapter_model.safetensors"}
ROW = {"data": "birds/test", "ways": 5, "shots": 1, "episodes": 600, "accuracy": 54.467, "ci95": 0.78}
ROW |= {"delta_vs_frozen": 1.53, "delta_ci95": 0.31}


def commits(hub, repo_id, repo_type="model"):
    """Titles of the commits to main, newest first, without the Hub's own first one."""
    repo, titles = hub.repo(repo_id, repo_type=repo_type), []
    sha = repo.resolve("main").sha
    while repo.commits[sha].parent:
        titles.append(repo.commits[sha].title)
        sha = repo.commits[sha].parent
    return titles


def header_of(card):
    return yaml.safe_load(card.split("---\n")[1])


def load(repo_id, **options):
    return MetaLoRAForFewShotClassification.from_pretrained(repo_id, **options)


def test_a_push_is_one_commit_of_a_plain_adapter(hub, model):
    assert model.push_to_hub("org/meta") == f"{hub.endpoint}/org/meta"
    assert commits(hub, "org/meta") == ["Upload meta-LoRA with lora-recycle"]
    files = hub.files("org/meta")
    extra = {"meta_lora_config.json", "README.md", "surrogate.png", ".gitattributes"}
    assert files.keys() == PEFT_FILES | extra
    sidecar = json.loads(files["meta_lora_config.json"])
    assert [source["license"] for source in sidecar["sources"]] == ["apache-2.0"] * 2
    picture = Image.open(io.BytesIO(files["surrogate.png"]))
    assert picture.size == (8 * 34 - 2, 3 * 34 - 2) and len(picture.getcolors(10**6)) > 100


def test_the_card_says_where_it_came_from(hub, model):
    model.settings["results"] = [ROW | {"method": "frozen"}, ROW | {"method": "meta-lora"}]
    model.push_to_hub("org/meta")
    card = ModelCard.load("org/meta")
    assert card.validate() is None and ModelCard(str(card)).content == card.content
    data = card.data
    assert (data.library_name, data.pipeline_tag, data.license) == ("peft", "image-feature-extraction", "apache-2.0")
    assert (data.base_model, data.base_model_relation) == ("org/tiny-vit", "adapter")
    (result,) = data.eval_results
    assert (data.model_name, result.dataset_name, result.metric_value) == ("meta", "birds/test", 54.47)
    assert result.metric_args == {"ci95": 0.78, "episodes": 600} and "5-way 1-shot" in result.metric_name
    assert [m.id for m in HfApi().list_models(filter="base_model:adapter:org/tiny-vit")] == ["org/meta"]
    for i in (0, 1):
        sha = hub.repo(f"org/adapter-{i}").resolve("main").sha
        assert f"[org/adapter-{i}](https://huggingface.co/org/adapter-{i}/tree/{sha})" in card.text
    base = hub.repo("org/tiny-vit").resolve("main").sha
    assert f"`org/tiny-vit` at commit `{base}`" in card.text
    for text in (
        'from_pretrained("org/meta")',
        "![Surrogate images](surrogate.png)",
        "| meta-lora | birds/test | 5-way 1-shot | 600 | 54.47 ± 0.78 | +1.53 ± 0.31 |",
        "was not trained",
        "Images like these were made, but not used in the result",
        "All source adapters are under `apache-2.0`",
        "steps: 0",
        "## Limits",
    ):
        assert text in card.text


@pytest.mark.parametrize(
    ("licenses", "fields", "text"),
    [
        ((None, None), {}, "No source adapter states a licence"),
        (("mit", None), {"license": "other", "license_name": "mixed"}, "`mit` (1), none stated (1)"),
        (("mit", "cc-by-4.0"), {"license": "other", "license_name": "mixed"}, "`cc-by-4.0` (1), `mit` (1)"),
        (("ours-1", "ours-1"), {"license": "other", "license_name": "ours-1"}, "are under `ours-1`"),
    ],
)
def test_the_licence_is_the_sources_or_stated_as_mixed(hub, make_model, licenses, fields, text):
    make_model(licenses, surrogate=None).push_to_hub("org/meta")
    card = hub.files("org/meta")["README.md"].decode()
    header = header_of(card)
    assert {key: header[key] for key in ("license", "license_name") if key in header} == fields
    assert text in card and "model-index" not in header and "surrogate.png" not in card
    assert "Its accuracy has not been measured" in card


def test_names_of_strangers_do_not_break_the_tables(hub, model):
    model.settings["sources"][0] |= {"name": "a|b\n# <b>evil", "revision": None}
    model.push_to_hub("org/meta")
    card = hub.files("org/meta")["README.md"].decode()
    assert "| a\\|b # \\<b\\>evil | LORA | local folder |" in card


SCRIPT = """
import sys
import torch
from lora_recycle import AdapterError, MetaLoRAForFewShotClassification as Model
pixels, support = torch.load(sys.argv[1], weights_only=True)
model = Model.from_pretrained("org/meta")
fitted = model.predict_proba(pixels), model.predict(pixels)
features = model.embed(pixels)
again = model.fit(support, [0, 1, 2, 0]).predict_proba(pixels)
torch.save([*fitted, features, again], sys.argv[2])
"""


def test_a_fresh_process_predicts_the_same_bit_for_bit(hub, model, tmp_path):
    pixels, support = random_pixels(6), random_pixels(4, seed=1)
    model.fit(support, ["b", "a", "b", "c"]).push_to_hub("org/meta")
    assert "few_shot_task.safetensors" in hub.files("org/meta")
    assert "It includes a fitted task with 3 classes" in hub.files("org/meta")["README.md"].decode()
    torch.save([pixels, support], tmp_path / "in.pt")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", SCRIPT, tmp_path / "in.pt", tmp_path / "out.pt"]
    subprocess.run(command, check=True, env=environment, timeout=120)
    probabilities, labels, features, again = torch.load(tmp_path / "out.pt", weights_only=True)
    assert torch.equal(probabilities, model.predict_proba(pixels)) and labels == model.predict(pixels)
    assert torch.equal(features, model.embed(pixels))
    assert torch.equal(again, model.fit(support, [0, 1, 2, 0]).predict_proba(pixels))


def test_revisions_are_branches_commits_and_pull_requests(hub, make_model):
    first, second = make_model(), make_model(init="zero", seed=3)
    x = torch.randn(2, 3, 32, 32)
    first.push_to_hub("org/meta", commit_message="one")
    sha = hub.repo("org/meta").resolve("main").sha
    assert second.push_to_hub("org/meta", revision="v2") == f"{hub.endpoint}/org/meta/tree/v2"
    url = second.push_to_hub("org/meta", create_pr=True)
    assert url == f"{hub.endpoint}/org/meta/discussions/1" and commits(hub, "org/meta") == ["one"]
    with torch.no_grad():
        one, two = first.features(x), second.features(x)
        assert not torch.equal(one, two)
        for revision, expected in ((None, one), (sha, one), ("v2", two), ("refs/pr/1", two)):
            assert torch.equal(load("org/meta", revision=revision).features(x), expected)


def test_a_second_push_replaces_the_first_and_the_same_push_is_no_commit(hub, model, make_model):
    model.fit(random_pixels(2), [0, 1]).push_to_hub("org/meta")
    plain = make_model(surrogate=None)
    assert plain.push_to_hub("org/meta") == plain.push_to_hub("org/meta")
    assert len(commits(hub, "org/meta")) == 2
    assert not hub.files("org/meta").keys() & {"few_shot_task.safetensors", "surrogate.png"}


def test_a_model_loaded_from_a_folder_or_the_hub_is_pushed_whole(hub, model, tmp_path):
    model.fit(random_pixels(2), [0, 1]).save_pretrained(tmp_path)
    load(tmp_path).push_to_hub("org/a")
    model.push_to_hub("org/b")
    a, b = hub.files("org/a"), hub.files("org/b")
    assert a.keys() == b.keys() and all(a[name] == b[name] for name in a if name != "README.md")
    load("org/b").push_to_hub("me/c")
    c = hub.files("me/c")
    assert c.keys() == a.keys() and all(c[name] == b[name] for name in c if name != "README.md")
    assert "![Surrogate images](surrogate.png)" in c["README.md"].decode()


# what goes wrong


@pytest.mark.parametrize(
    "fault",
    [
        lambda hub: hub.cut_upload("^PUT /lfs/", after_bytes=100, times=None),
        lambda hub: hub.fail_next("^PUT /lfs/", status=503, times=None),
        lambda hub: hub.cut_upload("POST .*/commit/", after_bytes=10),
        lambda hub: hub.fail_next("POST .*/commit/", status=500, times=None),
        lambda hub: hub.fail_next("POST .*/preupload/", status=403),
        lambda hub: hub.fail_next("POST /api/validate-yaml", status=400),
    ],
)
def test_a_failed_push_leaves_nothing_and_can_be_repeated(hub, model, fault):
    fault(hub)
    with pytest.raises(PushError, match="org/new: the push failed: .* run it again"):
        model.push_to_hub("org/new")
    assert not hub.exists("org/new")
    hub.faults = type(hub.faults)()  # the weather clears
    model.push_to_hub("org/new")
    assert len(commits(hub, "org/new")) == 1
    assert torch.equal(load("org/new").embed(random_pixels(1)), model.embed(random_pixels(1)))


def test_a_failed_push_leaves_an_older_repo_as_it_was(hub, model):
    before = hub.put("org/old", {"README.md": "# ours", "few_shot_task.safetensors": "x"})
    hub.cut_upload("POST .*/commit/", after_bytes=10, times=2)
    for options in ({}, {"revision": "v2"}):
        with pytest.raises(PushError, match="run it again"):
            model.push_to_hub("org/old", **options)
    repo = hub.repo("org/old")
    assert repo.resolve("main").sha == before and list(repo.refs) == ["refs/heads/main"]
    model.push_to_hub("org/old", revision="v2")
    assert repo.resolve("main").sha == before and repo.resolve("v2").parent == before


def test_a_commit_whose_answer_is_lost_is_kept_and_not_made_twice(hub, model):
    hub.cut_download("POST .*/commit/")
    with pytest.raises(PushError, match="all of it or nothing"):
        model.push_to_hub("org/new")
    assert hub.files("org/new").keys() > PEFT_FILES
    model.push_to_hub("org/new")
    assert len(commits(hub, "org/new")) == 1


def test_a_repo_that_moves_meanwhile_is_not_overwritten(hub, model):
    hub.put("org/old", {"README.md": "# ours"})
    hub.on_request("POST .*/commit/", lambda: hub.put("org/old", {"README.md": "# theirs"}))
    with pytest.raises(PushError, match="412"):
        model.push_to_hub("org/old")
    assert hub.files("org/old")["README.md"] == b"# theirs"


def test_busy_answers_are_waited_for(hub, model):
    hub.fail_next("^PUT /lfs/", status=429, retry_after=0, times=2)
    hub.fail_next("^PUT /lfs/", status=503)
    model.push_to_hub("org/new")
    assert len(commits(hub, "org/new")) == 1


def test_what_must_not_be_pushed_is_refused(hub, model, tiny_pool_path, tmp_path, monkeypatch):
    with pytest.raises(PushError, match=r"40[13].*hf auth login"):
        model.push_to_hub("org/new", token=READER_TOKEN)
    model.push_to_hub("org/meta")
    with pytest.raises(PushError, match="is public already"):
        model.push_to_hub("org/meta", private=True)
    hub.put("org/full", {"config.json": "{}"})
    with pytest.raises(PushError, match="holds config.json"):
        model.push_to_hub("org/full")
    with pytest.raises(PushError, match="Repo id must"):
        model.push_to_hub("not a name")
    model.save_pretrained(tmp_path / "linked")
    (tmp_path / "linked" / "surrogate.png").unlink()
    (tmp_path / "linked" / "surrogate.png").symlink_to("/etc/hostname")
    seen = len(hub.requests)
    assert main(["push", str(tmp_path / "linked"), "org/new"]) == 1
    assert main(["push", str(tiny_pool_path / "adapter-0"), "org/new"]) == 1  # its base lies in a local folder
    assert len(hub.requests) == seen and not hub.exists("org/new")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PushError, match="hf auth login"):
        model.push_to_hub("org/new")


def test_private_repos_are_made_private(hub, model):
    model.push_to_hub("org/secret", private=True)
    assert hub.repo("org/secret").private
    with pytest.raises(AdapterError, match="org/secret"):
        load("org/secret", token=READER_TOKEN)


# surrogate data


def test_surrogate_data_opens_with_datasets_and_with_us(hub, tiny_surrogate, tmp_path):
    assert tiny_surrogate.push_to_hub("org/surrogate") == f"{hub.endpoint}/datasets/org/surrogate"
    assert commits(hub, "org/surrogate", "dataset") == ["Upload surrogate data with lora-recycle"]
    pulled = SurrogateDataset.from_pretrained("org/surrogate")
    assert not list(pulled.folder.rglob("*.parquet"))
    for i in range(tiny_surrogate.num_shards):
        one, other = pulled.shard(i, verify=True), tiny_surrogate.shard(i)
        for name in ("pixels", "labels", "teacher_logits", "teacher_features", "kept_tokens"):
            assert torch.equal(getattr(one, name), getattr(other, name))
    rows = load_dataset("org/surrogate")
    assert list(rows) == ["train"]
    train, expected = rows["train"], tiny_surrogate.to_dataset()
    assert isinstance(train.features["image"], ImageFeature) and isinstance(train.features["label"], ClassLabel)
    assert train.features == expected.features and len(train) == len(tiny_surrogate) == 96
    assert train["label"][:] == expected["label"][:] and train["adapter"][:] == expected["adapter"][:]
    pixels = torch.cat([tiny_surrogate.shard(i).pixels for i in range(4)])
    assert np.array_equal(np.stack([np.asarray(p) for p in train["image"][:]]), pixels.permute(0, 2, 3, 1))


def test_the_card_of_surrogate_data(hub, tiny_surrogate):
    tiny_surrogate.push_to_hub("org/surrogate")
    card = hub.files("org/surrogate", repo_type="dataset")["README.md"].decode()
    header = header_of(card)
    assert header["task_categories"] == ["image-classification"] and header["size_categories"] == ["n<1K"]
    assert "license" not in header and "No source adapter states a licence" in card
    for entry in tiny_surrogate.manifest["shards"]:
        row = f"`{entry['adapter']['sha256']}` | 4 | 24 | {entry['accuracy']:.2f} | {entry['confidence']:.2f} |"
        assert row in card
    assert "iterations: 5" in card and "optimised in 5 steps from starting images" in card
    assert tiny_surrogate.manifest["backbone"]["name"] not in card  # a folder of this machine


def test_surrogate_data_that_is_damaged_or_shrinks(hub, tiny_surrogate, tmp_path):
    tiny_surrogate.push_to_hub("org/surrogate")
    shutil.copytree(tiny_surrogate.folder, tmp_path / "s")
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    gone = manifest["shards"].pop()["file"]
    (tmp_path / "s" / "manifest.json").write_text(json.dumps(manifest))
    SurrogateDataset.from_pretrained(tmp_path / "s").push_to_hub("org/surrogate")
    assert gone not in hub.files("org/surrogate", repo_type="dataset")
    (tmp_path / "s" / manifest["shards"][0]["file"]).write_bytes(b"junk")
    before = len(commits(hub, "org/surrogate", "dataset"))
    assert main(["push", str(tmp_path / "s"), "org/surrogate"]) == 1
    assert len(commits(hub, "org/surrogate", "dataset")) == before == 2


def test_files_are_removed_in_the_same_commit(hub):
    push_files("org/d", {"a/1": b"1", "b": b"2"}, repo_type="dataset")
    push_files("org/d", {"a/2": b"1"}, repo_type="dataset", replaces=["a/*"])
    assert hub.files("org/d", repo_type="dataset").keys() == {".gitattributes", "a/2", "b"}
    assert len(commits(hub, "org/d", "dataset")) == 2


LARGE = {"adapter_model.safetensors": b"w" * 100_000, "adapter_config.json": b"{}"}


def test_a_push_that_is_killed_between_upload_and_commit(hub):
    """What was uploaded is no part of the repo without a commit, and is not uploaded again."""
    child = []
    hub.on_request("^POST .*/commit/", lambda: os.kill(child[0], signal.SIGKILL))
    child.append(os.fork())
    if not child[0]:
        try:
            push_files("org/d", dict(LARGE))
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child[0], 0)[1]) == -signal.SIGKILL
    assert hub.exists("org/d") and hub.count("^PUT /lfs") == 1
    push_files("org/d", dict(LARGE))
    assert hub.files("org/d").items() >= LARGE.items() and hub.count("^PUT /lfs") == 1
    assert len(commits(hub, "org/d")) <= 2  # the Hub may have made the commit whose answer nobody heard


def test_a_push_that_is_interrupted_between_upload_and_commit(hub, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(HfApi, "create_commit", interrupted_at_the_commit)
        with pytest.raises(KeyboardInterrupt):
            push_files("org/d", dict(LARGE))
    assert hub.count("^PUT /lfs") == 1 and not hub.exists("org/d")
    push_files("org/d", dict(LARGE))
    assert len(commits(hub, "org/d")) == 1


def interrupted_at_the_commit(self, repo_id, operations, *, repo_type, **options):
    self.preupload_lfs_files(repo_id, operations, repo_type=repo_type)
    raise KeyboardInterrupt
