"""The price of the speed-ups: that every variant can be run, and that table and curves show what was measured."""

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch

from lora_recycle import DistillationConfig, InversionConfig, LoRAInverter


EXAMPLES = Path(__file__).parents[2] / "examples" / "studies"


@pytest.fixture
def efficiency(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    return importlib.import_module("efficiency")


def row(name, accuracy, **values):
    keys = [
        f"{init} cifar_fs/{split} {k}"
        for init in ("zero", "average")
        for split in ("validation", "test")
        for k in (1, 5)
    ]
    return {"name": name, **values, **{key: [accuracy - 1, accuracy, accuracy + 1] for key in keys}}


def test_every_variant_is_a_recipe_and_has_a_reference(efficiency):
    for name, (invert, distill) in efficiency.VARIANTS.items():
        assert InversionConfig(**{**efficiency.BASE_INVERT, **invert}).iterations <= 2000
        assert DistillationConfig(**{**efficiency.BASE_DISTILL, **distill}).steps == 60
        assert efficiency.REFERENCES.get(name.split()[0].split("-")[0], efficiency.BASE) in efficiency.VARIANTS


@pytest.mark.parametrize("name", ["Lbfgs", "Mixtures", "PreviousBatch"])
def test_what_was_tried_makes_images_that_their_adapter_knows(efficiency, tiny_pool, name):
    kind = {inverter.__name__: inverter for inverter in efficiency.INVERTERS.values()}[name]
    config = InversionConfig(images_per_class=2, iterations=12, stop_at=1.0, jitter=0, lr=0.1)
    inverter = kind(tiny_pool, config)
    for index in (0, 1):
        shard = inverter.invert(index)
        assert inverter.losses[-1] < 0.8 * inverter.losses[0]
    assert not torch.equal(shard.pixels, LoRAInverter(tiny_pool, config).invert(1).pixels)


def test_some_lines_are_made_anew_and_the_others_stay(efficiency):
    old = [{"name": "frozen"}, {"name": "masked 50%", "x": 1}, {"name": "masked 75%", "x": 1}]
    new = [{"name": "plain Adam, 30 iterations", "x": 2}, {"name": "masked 50%", "x": 2}]
    assert efficiency.with_lines(old, new) == [old[0], *new, old[2]]
    measured = {name: row(name, 50.0) for name in ("multi-resolution, 30 iterations", "masked 75%")}
    (line,) = efficiency.summary(measured, ["masked 75%"])
    assert line["delta zero cifar_fs/test 1"] == (0.0, 0.0)


def test_differences_are_paired_with_the_reference(efficiency):
    measured = {"image_iterations": 100, "inversion_seconds": 2.0, "surrogate_accuracy": 0.5}
    names = ("plain Adam, 2000 iterations", "multi-resolution, 30 iterations", "masked 75%")
    rows = {name: row(name, 50.0 + 2 * i, **measured) for i, name in enumerate(names)}
    rows["masked 75%"]["zero cifar_fs/validation 1"] = [52.0, 52.0, 55.0]
    found = {r["name"]: r for r in efficiency.summary(rows)}
    assert found[names[1]]["delta average cifar_fs/test 5"] == (2.0, 0.0) and found[names[1]]["reference"] == names[0]
    mean, half = found["masked 75%"]["delta zero cifar_fs/validation 1"]  # against 51, 52, 53
    assert mean == 1.0 and abs(half - 4.302653 * torch.tensor([1.0, 0.0, 2.0]).std().item() / 3**0.5) < 1e-6


def test_the_table_and_the_curves_show_the_rows(efficiency):
    price = importlib.import_module("speed.price")
    rows = {
        name: row(name, accuracy, image_iterations=work, inversion_seconds=work / 80, surrogate_accuracy=0.9)
        for name, accuracy, work in (
            ("plain Adam, 2000 iterations", 50.0, 240_000),
            ("multi-resolution, 10 iterations", 49.0, 1200),
            ("multi-resolution, 30 iterations", 51.0, 3600),
        )
    }
    rows = efficiency.summary(
        {"frozen": {"name": "frozen", **{k: v for k, v in row("", 48.0).items() if "average" in k}}, **rows}
    )
    lines = price.table(rows).splitlines()
    assert len(lines) == 6 and "*frozen*" in lines[2] and "| 240,000 | 3000 | 90% | 50.0 ±" in lines[3]
    assert "+1.0 ± 0.0 / +1.0 ± 0.0" in lines[5]
    drawn = price.curves(rows)
    assert drawn.count("<circle") == 2 + 2 * 3  # the legend, and each row in both panels
    plain, few, many = (float(y) for y in re.findall(r'cy="([\d.]+)" r="4"', drawn)[2:5])
    assert many < plain < few  # higher on the page is more accurate
