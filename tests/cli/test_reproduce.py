"""`reproduce`: the same bytes from the sidecar alone, and what is told where they are not."""

import json
import shutil

import pytest
import torch
from helpers_old_names import as_format_1
from helpers_tiny import repair_checksums
from safetensors.torch import load_file, save_file

from lora_recycle.distillation.reproduction import reproduce


WEIGHTS = "adapter_model.safetensors"


def test_two_runs_in_one_process_give_the_same_bytes(work, tmp_path, run):
    invert = ["--images-per-class", 2, "--iterations", 2, "--keep-ratio", 0.5, "--quiet"]
    assert run("invert", work / "pool", "--output", tmp_path / "surrogate", *invert)[0] == 0
    distill = ["--steps", 3, "--rank", 2, "--relational-batch", 12, "--quiet", "--output", tmp_path / "meta"]
    assert run("distill", work / "pool", "--surrogate", tmp_path / "surrogate", *distill)[0] == 0
    for path in [*(work / "surrogate").rglob("*"), *(work / "meta").glob("*")]:
        if path.is_file() and not path.name.startswith(".") and path.suffix != ".html":  # pages name their folder
            assert (tmp_path / path.relative_to(work)).read_bytes() == path.read_bytes()


def test_a_sidecar_says_all_that_made_the_meta_lora(work):
    sidecar = json.loads((work / "meta" / "meta_lora_config.json").read_text())
    manifest = json.loads((work / "surrogate" / "manifest.json").read_text())
    assert [s["surrogate_sha256"] for s in sidecar["sources"]] == [e["sha256"] for e in manifest["shards"]]
    assert sidecar["distillation"]["seed"] == sidecar["inversion"]["seed"] == 0
    assert sidecar["inversion_precision"] == ["torch.float32", "no"]
    assert sidecar["backbone"]["name"] == str(work / "base") and len(sidecar["backbone"]["sha256"]) == 64
    hardware = sidecar["hardware"]
    assert hardware["device"] == "cpu" and hardware["threads"] == torch.get_num_threads()
    assert hardware["processes"] == 1
    assert hardware["name"] and hardware["instructions"] and hardware["system"]


@pytest.mark.parametrize("from_surrogate", [False, True])
def test_what_is_made_again_is_the_same(work, tmp_path, run, from_surrogate):
    options = ["--surrogate", work / "surrogate"] if from_surrogate else []
    code, out, err = run("reproduce", work / "meta", work / "pool", *options, "--output", tmp_path, "--quiet")
    assert code == 0 and out == f"{tmp_path / 'meta_lora'}: byte-identical\n"
    assert "surrogate data: 3 of 3 shards byte-identical" in err and "differs" not in err
    assert (tmp_path / "meta_lora" / WEIGHTS).read_bytes() == (work / "meta" / WEIGHTS).read_bytes()
    assert (tmp_path / "surrogate").exists() != from_surrogate


def test_a_sidecar_with_the_names_of_the_first_format_is_made_again(work, tmp_path, run):
    shutil.copytree(work / "meta", tmp_path / "meta")
    path = tmp_path / "meta" / "meta_lora_config.json"
    path.write_text(json.dumps(as_format_1(json.loads(path.read_text()))))
    assert "held_out" in path.read_text() and "class_centres" in path.read_text()
    command = ["reproduce", tmp_path / "meta", work / "pool", "--surrogate", work / "surrogate", "--quiet"]
    assert run(*command, "--output", tmp_path / "again")[:2] == (
        0,
        f"{tmp_path / 'again' / 'meta_lora'}: byte-identical\n",
    )


def test_what_is_not_the_same_is_told_with_the_versions(work, tmp_path, run):
    shutil.copytree(work / "meta", tmp_path / "meta")
    tensors = load_file(tmp_path / "meta" / WEIGHTS)
    tensors[min(tensors)][0, 0] += 0.25
    save_file(tensors, tmp_path / "meta" / WEIGHTS, metadata={"format": "pt"})
    path = tmp_path / "meta" / "meta_lora_config.json"
    sidecar = json.loads(path.read_text())
    sidecar["versions"]["torch"] = "1.0"
    sidecar["hardware"]["name"] = "another"
    sidecar["sources"][1]["surrogate_sha256"] = "0" * 64
    path.write_text(json.dumps(sidecar))
    repair_checksums(tmp_path / "meta")
    command = ["reproduce", tmp_path / "meta", work / "pool", "--surrogate", work / "surrogate", "--quiet"]
    code, out, err = run(*command, "--output", tmp_path / "again")
    assert code == 1 and "not byte-identical; weights differ by up to 0.25" in out
    lines = [line.split() for line in err.splitlines()]
    assert lines[0] == ["surrogate", "data:", "2", "of", "3", "shards", "byte-identical"]
    assert [line[:3] for line in lines[2:]] == [["versions:", "torch", "1.0"], ["hardware:", "name", "another"]]


def test_what_cannot_be_made_again_is_named(work, tmp_path, fails):
    output = ["--output", tmp_path / "o", "--quiet"]
    assert "photos-000" in (line := fails("reproduce", work / "meta", *output)) and "Name the pool" in line
    other = work / "pool" / "photos-001"
    assert "photos-000" in fails("reproduce", work / "meta", other, *output)
    assert "does not say how it was made: sources is missing" in fails("reproduce", other, work / "pool", *output)
    shutil.copytree(work / "meta", tmp_path / "meta")
    path = tmp_path / "meta" / "meta_lora_config.json"
    sidecar = json.loads(path.read_text())
    for change, told in (
        ({"sources": [{"name": "a"}]}, "a source must have a name and a sha256"),
        ({"distillation": {**sidecar["distillation"], "stepz": 1}}, "unknown key 'stepz'"),
        ({"inversion": None}, "has no recipe of the surrogate data"),
    ):
        path.write_text(json.dumps({**sidecar, **change}))
        assert told in fails("reproduce", tmp_path / "meta", work / "pool", *output)


def test_the_average_alone_is_made_again_without_images(work, tmp_path, run):
    assert (
        run("distill", work / "pool", "--output", tmp_path / "average", "--steps", 0, "--rank", 2, "--quiet")[0] == 0
    )
    found = reproduce(tmp_path / "average", tmp_path / "again", pool=[work / "pool"], progress=False)
    assert found.identical and found.max_difference == 0 and found.shards is None and not found.conditions
