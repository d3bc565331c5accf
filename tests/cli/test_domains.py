"""Experts on the command line: inspect lists them, predict says whose answers."""

import json

import pytest
from helpers_domains import MEMBERS, mixed_model
from PIL import Image


@pytest.fixture(scope="module")
def meta(tiny_backbone_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed") / "meta"
    mixed_model(tiny_backbone_path).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photos(toy_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for name in ("n0", "n3"):
        (folder / name).mkdir()
        for row in toy_data.by_class()[toy_data.label_names.index(name)][:3].tolist():
            Image.fromarray(toy_data.pixels[row].permute(1, 2, 0).numpy()).save(folder / name / f"{row}.png")
    return folder


def test_inspect_lists_the_experts(run, meta):
    code, out, _ = run("inspect", meta)
    assert code == 0 and "4 experts" in out
    for number, name in enumerate(MEMBERS, 1):
        (line,) = [line for line in out.splitlines() if line.startswith(name)]
        assert f"experts/{number}" in line and ("compared with" in line) == (name == "rest")
    code, out, _ = run("inspect", meta, "--json")
    (found,) = json.loads(out)
    assert [expert["name"] for expert in found["domains"]["experts"]] == list(MEMBERS)


def test_inspect_tells_of_a_damaged_expert(run, meta, tmp_path):
    (tmp_path / "meta").mkdir()
    for path in meta.iterdir():
        if path.is_file():
            (tmp_path / "meta" / path.name).write_bytes(path.read_bytes())
    code, out, _ = run("inspect", tmp_path / "meta")
    assert "experts/1 (dogs): the expert is missing" in out


def test_predict_says_which_domain_and_takes_another(run, meta, photos):
    code, _, err = run("predict", meta, "--support", photos, photos / "n0")
    assert code == 0 and "Domain: " in err
    code, _, err = run("predict", meta, "--support", photos, "--domain", "cars", photos / "n0")
    assert code == 0 and "Domain: cars" in err
    code, _, err = run("predict", meta, "--support", photos, "--domain", "boats", photos / "n0")
    assert code != 0 and "no domain 'boats'" in err
    code, _, err = run("predict", meta, "--domain", "cars", photos / "n0", photos / "n3")
    assert code != 0 and "--domain" in err and "--support" in err
