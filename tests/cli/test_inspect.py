"""`lora-recycle inspect` says whether an adapter can be used, in the words with which `invert` refuses it."""

import json
import re
import shutil

import pytest
import torch
from helpers_adapters import edit_config, edit_tensors
from helpers_hub import publish

from lora_recycle.backbones.base_models import BaseModel


HEAD = "base_model.model.classifier."


def spoil_nan(tensors):
    tensors[min(key for key in tensors if "lora_A" in key)][0, 0] = torch.nan
    return tensors


SPOILT = {
    "NaN": (spoil_nan, "lora_A.weight holds NaN or infinity"),
    "unknown keys": (
        lambda tensors: tensors | {"base_model.model.vit.layers.7.mlp.fc1.lora_A.weight": torch.zeros(2, 16)},
        "ViTModel has no such module, under today's or older names",
    ),
    "missing keys": (
        lambda tensors: {key: tensor for key, tensor in tensors.items() if "layers.1.mlp.fc2.lora_B" not in key},
        "lacks 1 tensor",
    ),
    "no head": (
        lambda tensors: {key: tensor for key, tensor in tensors.items() if not key.startswith(HEAD)},
        "has no head, and its class names make none: .* is a vit model without a text tower",
    ),
    "another base": (
        lambda tensors: {key: torch.cat([t, t], -1) if "lora_A" in key else t for key, t in tensors.items()},
        "Was the adapter made for another base model",
    ),
}


@pytest.fixture
def adapter(work, tmp_path):
    return shutil.copytree(work / "pool" / "photos-000", tmp_path / "stranger")


@pytest.mark.parametrize("what", SPOILT)
def test_what_invert_refuses_is_not_usable_for_the_same_reason(adapter, tmp_path, run, fails, what):
    change, reason = SPOILT[what]
    edit_tensors(adapter, change)
    refusal = fails("invert", adapter, "--output", tmp_path / "out", "--quiet").removeprefix("lora-recycle: error: ")
    code, out, err = run("inspect", adapter)
    table, _, said = out.partition("\n\n")
    assert code == 0 and said == f"usable: no, because {refusal}" and "Next:" not in err
    row = dict(zip(*(line.split() for line in table.splitlines()), strict=False))
    assert table.splitlines()[1].split()[-2] == "no" and row["name"] == "stranger"
    code, out, _ = run("inspect", adapter, "--json")
    (told,) = json.loads(out)
    assert (told["usable"], told["reason"]) == (False, refusal.strip())
    assert re.search(reason, refusal)


def test_an_adapter_without_head_and_names_says_what_makes_one(adapter, run, tmp_path, fails):
    (adapter / "README.md").unlink()
    edit_tensors(adapter, SPOILT["no head"][0])
    refusal = fails("invert", adapter, "--output", tmp_path / "out", "--quiet").removeprefix("lora-recycle: error: ")
    assert f"usable: no, because {refusal}" in run("inspect", adapter)[1]
    assert "stranger: has no classification head, so it cannot be inverted." in refusal


def test_sound_adapters_of_every_type_and_meta_loras_are_usable(work, run):
    for what, count in (("pool", 3), ("meta", 1)):
        code, out, err = run("inspect", work / what)
        assert code == 0 and "Next:" in err and "usable: " not in out
        rows = out.splitlines()[1 : 1 + count]  # below them, the experts of a meta-LoRA
        assert [line.split()[-2] for line in rows] == ["yes"] * count


def test_the_bases_weights_are_not_fetched(work, hub, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub.put("org/base", work / "base")
    publish(hub, "org/adapter", work / "pool" / "photos-000")
    publish(hub, "org/lora", work / "pool" / "photos-002")  # of a type whose changes only the weights tell
    code, out, _ = run("inspect", "org/adapter", "org/lora", "--quiet")
    assert code == 0 and [line.split()[-2] for line in out.splitlines()[1:]] == ["yes", "yes"]
    folder = BaseModel.pull("org/base", files={"config.json": 10**6}).folder
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "preprocessor_config.json"]


def test_without_its_base_it_is_not_known_unless_the_numbers_tell(work, adapter, run, hub):
    for base in ("org/nowhere", str(work / "nowhere")):
        edit_config(adapter, base_model_name_or_path=base)
        _, out, err = run("inspect", adapter)
        assert f"usable: not known, because {base}: the backbone cannot be loaded" in out and "Next:" in err
        assert out.splitlines()[1].split()[-2] == "?"
        (told,) = json.loads(run("inspect", adapter, "--json")[1])
        assert told["usable"] is None
    edit_tensors(adapter, spoil_nan)
    assert "usable: no, because stranger: adapter_model.safetensors: " in run("inspect", adapter)[1]


def test_names_alone_are_not_checked(adapter, run, monkeypatch):
    monkeypatch.setattr(BaseModel, "pull", lambda *args, **kwargs: pytest.fail("looked at the base"))
    assert run("inspect", adapter, "--short")[1].strip() == str(adapter)
