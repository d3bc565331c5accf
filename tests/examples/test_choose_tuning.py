"""Choosing how to tune: variants can be made, gains are paired, a finished cell is kept while its settings hold."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers_tiny import random_pixels

from lora_recycle import MetaLoRAForFewShotClassification, TaskTuningConfig
from lora_recycle.evaluation.tuned import MetaLoRATuning
from lora_recycle.fewshot.episodes import sample_episodes
from lora_recycle.finetuning import tuning_methods
from lora_recycle.images.labelled import LabelledImages


@pytest.fixture
def choosing(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[2] / "examples" / "studies"), *sys.path])
    return importlib.import_module("choose_tuning")


@pytest.fixture(scope="module")
def model():
    return MetaLoRAForFewShotClassification.from_pretrained("demo")


def test_every_variant_of_every_method_can_be_made(choosing, model):
    for method in ("tune", *tuning_methods()):
        made = {name: choosing.make_method(method, model, name).config.to_dict() for name in choosing.VARIANTS}
        assert made["untuned"]["steps"] == 0 and made["two layers"]["last_layers"] == 2
        assert made["a third of the step size"]["lr"] == made["default"]["lr"] / 3
    default = choosing.make_method("tune", model, "default").config
    assert default.leave_one_out and default.last_layers == 1
    assert not choosing.make_method("tune", model, "free prototypes").config.leave_one_out


def test_a_cell_is_kept_while_its_settings_hold(choosing, model, tmp_path, monkeypatch):
    data = LabelledImages(random_pixels(12), torch.arange(12) // 4, list("abc"), "toy")
    drawn, path, calls = sample_episodes(data.labels, 2, 1, 1, 2, 0), tmp_path / "cell.json", []
    monkeypatch.setattr(
        choosing, "judge", lambda *args: calls.append(1) or {"accuracies": [50.0, len(calls)], "seconds": 0.1}
    )
    methods = [MetaLoRATuning(model, TaskTuningConfig(steps=steps)) for steps in (0, 0, 3)]
    found = [choosing.cell(method, None, data, drawn, path) for method in methods]
    assert found[0] == found[1] and found[0]["accuracies"] == [50.0, 1]
    assert found[2]["accuracies"] == [50.0, 2] and found[2]["settings"]["steps"] == 3


def test_gains_are_paired(choosing):
    cells = {
        ("untuned", "toy", 1): {"accuracies": [10.0, 90.0, 50.0], "seconds": 0.0},
        ("default", "toy", 1): {"accuracies": [11.0, 91.0, 51.0], "seconds": 2.0},
    }
    row = choosing.table(cells)["default"]
    assert row == {"toy 1": (1.0, 0.0), "all 1": (1.0, 0.0), "seconds 1": 2.0}


def test_one_image_of_each_class_is_judged_as_untuned(choosing, model):
    data = LabelledImages(
        torch.randint(0, 256, (12, 3, 64, 64), dtype=torch.uint8), torch.arange(12) // 4, list("abc"), "toy"
    )
    drawn = sample_episodes(data.labels, 3, 1, 3, 2, 0)
    pool = SimpleNamespace(backbone=model.backbone)
    found = [choosing.judge(choosing.make_method("tune", model, v), pool, data, drawn) for v in ("untuned", "default")]
    assert found[0]["accuracies"] == found[1]["accuracies"]
