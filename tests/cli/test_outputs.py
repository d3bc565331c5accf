"""No verb deletes or replaces what it did not write, and none finds out after the work that it cannot write."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from helpers_adapters import save_adapter

from lora_recycle.adapters.pull import pull_adapter
from lora_recycle.runtime.outputs import MARKER


MINE = (
    "README.md",
    "manifest.json",
    "config.json",
    "surrogate.png",
    "results.json",
    "export.json",
    "training_log.json",
)
MINE += ("few_shot_task.safetensors", "shards/mine.safetensors", "checkpoint-00000001.safetensors", "notes.txt")
MINE += (
    ".theirs.1.partial/file",
    ".lock",
    ".owner.json",
    "work/mine.txt",
    "cells/mine.json",
    "shards/0000-mine.safetensors",
)


@pytest.fixture
def commands(work, tmp_path):
    """Each verb that writes a folder, without its output."""
    recipe = tmp_path / "benchmark.yaml"
    recipe.write_text(f"data: [{{path: {work / 'photos'}}}]\npools: {{p: {{adapters: [{work / 'pool'}]}}}}\n")
    quick = ["--images-per-class", 2, "--iterations", 2]
    distill = ["distill", work / "pool", "--surrogate", work / "surrogate", "--steps", 1, "--rank", 2]
    return {
        "invert": ["invert", work / "pool", *quick],
        "invert anew": ["invert", work / "pool", *quick, "--no-resume"],
        "distill": distill,
        "distill anew": [*distill, "--no-resume"],
        "quantize": ["quantize", work / "meta", "--bits", 8],
        "export": ["export", work / "meta", "--format", "torch"],
        "export a checkpoint": ["export", work / "meta", "--format", "transformers"],
        "demo": ["demo", "--pool", work / "pool"],
        "benchmark": ["benchmark", recipe],
    }


VERBS = (
    "invert",
    "invert anew",
    "distill",
    "distill anew",
    "quantize",
    "export",
    "export a checkpoint",
    "demo",
    "benchmark",
)


def content(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("verb", VERBS)
def test_a_folder_of_the_user_stays_as_it_is(commands, tmp_path, fails, verb):
    folder = tmp_path / "mine"
    for name in MINE:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}" if name.endswith(".json") else "mine")
    before = content(folder)
    line = fails(*commands[verb], "--output", folder, "--quiet")
    assert f"{folder}: holds other files (" in line and "which is not replaced. Name a new" in line
    assert content(folder) == before


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("other", ["pool", "surrogate", "meta", "."])
def test_results_of_other_verbs_and_the_folder_above_stay_as_they_are(commands, work, tmp_path, fails, verb, other):
    if (other, verb.split()[0]) in (("surrogate", "invert"), ("meta", "distill")):
        pytest.skip("its own")
    copied = tmp_path / "copy"
    for name in ("pool", "surrogate", "meta"):
        shutil.copytree(work / name, copied / name)
    before = content(copied)
    line = fails(*commands[verb], "--output", copied / other, "--quiet")
    kind = {"surrogate": "surrogate data", "meta": "a meta-LoRA"}.get(other, "other files")
    assert f"holds {kind} (" in line and content(copied) == before


def test_tune_pool_leaves_a_folder_of_the_user(work, tmp_path, fails):
    mine = tmp_path / "pool" / "photos-000"
    mine.mkdir(parents=True)
    (mine / "holiday.jpg").write_text("mine")
    quick = ["--classes", 4, "--epochs", 1, "--rank", 2, "--tasks", 1, "--base-model", work / "base", "--quiet"]
    line = fails("train-adapters", work / "photos", "--output", tmp_path / "pool", *quick)
    assert "pool: holds other files (photos-000), which is not replaced" in line
    assert content(tmp_path) == {"pool/photos-000/holiday.jpg": b"mine"}


def test_import_leaves_a_folder_of_the_user(work, tmp_path, fails):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "f.safetensors").touch()
    line = fails("import", tmp_path / "f.safetensors", "--base-model", work / "base", "--output", tmp_path / "out")
    assert "holds other files (notes.txt)" in line and content(tmp_path / "out") == {"notes.txt": b"mine"}


def test_no_resume_deletes_what_invert_wrote_and_no_other_shard(commands, work, tmp_path, run):
    folder = tmp_path / "surrogate"
    shutil.copytree(work / "surrogate", folder)
    (folder / "shards" / "mine.safetensors").write_text("mine")
    stale = next((folder / "shards").glob("0000-*"))
    shutil.copyfile(stale, folder / "shards" / "0009-gone.safetensors")  # of a pool that was larger
    stale.write_text("damaged")
    assert run(*commands["invert anew"], "--output", folder, "--quiet")[0] == 0
    names = {path.name for path in (folder / "shards").iterdir()}
    assert "mine.safetensors" in names and "0009-gone.safetensors" not in names and len(names) == 4
    assert (folder / "shards" / "mine.safetensors").read_text() == "mine" and stale.read_bytes() != b"damaged"


def test_distill_does_not_delete_a_checkpoint_of_another_name(commands, work, tmp_path, run):
    shutil.copytree(work / "meta", tmp_path / "meta")
    mine = tmp_path / "meta" / "work" / "checkpoint-best.safetensors"
    mine.write_text("mine")
    assert run(*commands["distill anew"], "--output", tmp_path / "meta", "--quiet")[0] == 0
    assert mine.read_text() == "mine"


def test_results_of_evaluate_replace_only_such_results(evaluate_arguments, tmp_path, run, fails):
    path = tmp_path / "results.json"
    for _ in range(2):
        assert run(*evaluate_arguments, "--no-pool", "--json", path)[0] == 0
    (tmp_path / "mine.json").write_text('{"mine": 1}')
    line = fails(*evaluate_arguments, "--no-pool", "--json", tmp_path / "mine.json")
    assert "mine.json: is there already, and is not what lora-recycle evaluate wrote" in line
    assert (tmp_path / "mine.json").read_text() == '{"mine": 1}'


def test_evaluate_says_before_the_work_that_it_cannot_write(evaluate_arguments, tmp_path, fails, monkeypatch):
    monkeypatch.setattr("lora_recycle.evaluation.evaluate.evaluate", lambda *a, **k: pytest.fail("it worked"))
    (tmp_path / "file").touch()
    assert "file cannot be written: " in fails(
        *evaluate_arguments, "--no-pool", "--json", tmp_path / "file" / "r.json"
    )


def test_inspect_replaces_only_a_page_of_its_own(work, tmp_path, run, fails):
    shutil.copytree(work / "surrogate", tmp_path / "surrogate")
    for _ in range(2):
        assert run("inspect", tmp_path / "surrogate", "--images", "--quiet")[0] == 0
    page = tmp_path / "surrogate" / "images.html"
    page.write_text("<html>mine</html>")
    line = fails("inspect", tmp_path / "surrogate", "--images", "--quiet")
    assert "images.html: is there already, and is not a page of lora-recycle" in line
    assert page.read_text() == "<html>mine</html>"


@pytest.mark.parametrize("verb", ["quantize", "export"])
def test_after_a_full_disk_the_same_command_works(commands, work, tmp_path, run, fails, file_size_limit, verb):
    command = [*commands[verb], "--output", tmp_path / "out", "--quiet"]
    with file_size_limit(2000):
        line = fails(*command)
    assert f"{tmp_path / 'out'} cannot be written: File too large" in line and "run the same command again" in line
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".yaml"]
    assert run(*command)[0] == 0


def test_quantise_after_a_kill_clears_away_and_works(commands, tmp_path, run, monkeypatch):
    command = [*commands["quantize"], "--output", tmp_path / "out", "--quiet"]
    with monkeypatch.context() as patch:  # nothing is cleared away, as by SIGKILL
        patch.setattr("lora_recycle.runtime.files.shutil.rmtree", lambda *args, **options: None)
        patch.setattr("pathlib.Path.rename", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(*command)[0] == 130
    (left,) = tmp_path.glob(".out.*.partial")
    assert run(*command)[0] == 0 and not left.exists()
    assert pull_adapter(tmp_path / "out").bits == 8 and not (tmp_path / "out" / MARKER).exists()


def test_an_export_in_another_format_takes_another_folder(commands, tmp_path, run, fails):
    for _ in range(2):
        assert run(*commands["export"], "--output", tmp_path / "out", "--quiet")[0] == 0
    line = fails(*commands["export a checkpoint"], "--output", tmp_path / "out", "--quiet")
    assert "holds an export (torch) (export.json, model.pt2)" in line


def test_reproduce_says_before_the_work_that_it_cannot_compare_codes(work, tmp_path, run, fails, monkeypatch):
    assert run("quantize", work / "meta", "--bits", 8, "--output", tmp_path / "small", "--quiet")[0] == 0
    monkeypatch.setattr("lora_recycle.distillation.reproduction._pool", lambda *a, **k: pytest.fail("it worked"))
    line = fails("reproduce", tmp_path / "small", work / "pool", "--output", tmp_path / "again", "--quiet")
    assert "its weights are stored in 8 bits" in line and "Name the meta-LoRA that it was made from" in line
    assert not (tmp_path / "again").exists()


def test_reproduce_leaves_what_is_not_its_own(work, tmp_path, fails):
    mine = tmp_path / "out" / "meta_lora" / "README.md"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    line = fails("reproduce", work / "meta", work / "pool", "--output", tmp_path / "out", "--quiet")
    assert "meta_lora: holds other files (README.md)" in line and mine.read_text() == "mine"


@pytest.mark.parametrize(("redirection", "told"), [(">&-", "stdout is closed"), (">&- 2>&-", ""), ("2>&-", "")])
def test_closed_streams(tmp_path, redirection, told):
    save_adapter(tmp_path / "adapter")
    command = f"{sys.executable} -m lora_recycle inspect {tmp_path / 'adapter'} --short {redirection}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == (1 if ">&- " in f"{redirection} " and redirection != "2>&-" else 0)
    assert "bug" not in done.stderr and told in done.stderr
    assert done.stdout == ("" if redirection != "2>&-" else f"{tmp_path / 'adapter'}\n")


def test_the_markers_are_not_published(work, tmp_path):
    assert json.loads((work / "meta" / MARKER).read_text()) == {"kind": "a meta-LoRA"}
    assert not [name for name in os.listdir(work / "pool") if name.startswith(".")]
