"""The studies of the ablations, and one of them for real on tiny adapters."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from helpers_tiny import random_pixels
from PIL import Image

from lora_recycle.evaluation.results import confidence
from lora_recycle.hub.embedded import pool_path


EXAMPLES = Path(__file__).parents[2] / "examples" / "studies"


@pytest.fixture
def ablations(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    return importlib.import_module("ablations")


@pytest.fixture
def data(tmp_path, toy_data):
    """toy/test.parquet, noisy toy images."""
    pixels = (toy_data.pixels.float() * 0.2 + random_pixels(160).float() * 0.8).to(torch.uint8)
    rows = range(0, 160, 2)
    columns = {
        "image": [Image.fromarray(pixels[i].permute(1, 2, 0).numpy()) for i in rows],
        "label": [int(toy_data.labels[i]) for i in rows],
    }
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=toy_data.label_names)})
    (tmp_path / "data" / "toy").mkdir(parents=True)
    Dataset.from_dict(columns, features).to_parquet(tmp_path / "data" / "toy" / "test.parquet")
    return tmp_path / "data"


def test_every_study_can_be_run(ablations):
    asked = {"adapters", "tuned", "mixed", "rank", "images", "iterations", "prior", "keep", "loss", "interpolation"}
    assert set(ablations.STUDIES) == asked | {"counts", "episodes", "domain"}
    for name, (_, points) in ablations.STUDIES.items():
        assert len({point.name for point in points}) == len(points) > 1, name
        for point in points:
            invert, distill = point.config()  # raises where a setting is out of range
            assert point.minutes() > 0
            if distill.kl_weight or distill.interpolation_weight:
                assert distill.shots + distill.queries <= invert.images_per_class, name
            if point.tuned is None:
                assert all((pool_path() / adapter).is_dir() for adapter in point.adapters), name


def test_a_study_resumes_and_pairs_its_differences(ablations, data, tmp_path, tiny_pool_path, monkeypatch):
    monkeypatch.setattr(ablations, "pool_path", lambda: tiny_pool_path)
    monkeypatch.setattr(ablations, "BASE_INVERT", {"images_per_class": 2, "max_classes": 3, "iterations": 1})
    monkeypatch.setattr(ablations, "BASE_DISTILL", {"steps": 2, "relational_batch": 8, "rank": 4})
    own = {"adapters": ("adapter-0", "adapter-1"), "sets": ("toy",), "test": ((3, 1),)}
    points = [ablations.Point("2", distill={"rank": 2}, **own), ablations.Point("4", **own)]
    monkeypatch.setattr(ablations, "STUDIES", {"rank": ("rank", points)})
    lab = ablations.Lab(data, tmp_path / "work", "test", episodes=10)
    assert ablations.run_study("rank", lab, (1, 2)) is None
    result = ablations.run_study("rank", lab)
    assert len(list((tmp_path / "work").glob("surrogate-*"))) == 1  # made once for both points
    monkeypatch.setattr(ablations.Lab, "run", None)
    assert ablations.run_study("rank", lab) == result
    assert [point["name"] for point in result["points"]] == ["2", "4"]
    methods = result["points"][0]["tasks"]["toy 3-way 1-shot"]
    assert set(methods) == {"frozen", "average", "from zero", "from average"}
    assert methods["frozen"]["vs frozen"] == (0, 0) and methods["average"]["vs average"] == (0, 0)
    assert methods["from zero"]["accuracy"][0] > 33  # chance
    ablations.draw(result, tmp_path / "rank.svg")
    svg = (tmp_path / "rank.svg").read_text()
    assert svg.count("<rect class") == 2 + 1 and svg.count("<circle") == 2 + 1 and "toy 3-way 1-shot" in svg


def test_summary_by_hand(ablations, monkeypatch):
    monkeypatch.setattr(ablations, "STUDIES", {"s": ("axis", [])})
    found = {"a": {"frozen": {"t": [10.0, 20.0]}, "average": {"t": [20.0, 20.0]}, "from zero": {"t": [30.0, 20.0]}}}
    zero = ablations.summary("s", found)["points"][0]["tasks"]["t"]["from zero"]
    assert zero["accuracy"][0] == 25 and zero["vs frozen"][0] == 10 and zero["vs average"][0] == 5
    assert zero["vs average"] == confidence(torch.tensor([10.0, 0.0]))
