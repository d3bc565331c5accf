"""Meta-training on real images: it learns, goes on after a kill to the same bits, and is a meta-LoRA."""

import importlib
import math
import sys
from pathlib import Path

import pytest
import torch
from helpers_tiny import random_pixels, tiny_backbone

from lora_recycle import DistillationConfig
from lora_recycle.images.labelled import LabelledImages


EXAMPLES = Path(__file__).parents[2] / "examples" / "studies"
CONFIG = {"steps": 30, "rank": 4, "ways": 3, "queries": 3, "episodes": 2, "lr": 5e-3, "save_steps": 10}


@pytest.fixture
def reference(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    return importlib.import_module("real_data_reference")


@pytest.fixture(scope="module")
def sets(toy_data):
    pixels = (toy_data.pixels.float() * 0.15 + random_pixels(160).float() * 0.85).to(torch.uint8)
    noisy = LabelledImages(pixels, toy_data.labels, toy_data.label_names, "noisy")
    return [noisy, toy_data]


def test_it_learns_and_goes_on_where_it_was_killed(reference, sets, tmp_path, monkeypatch):
    config, options = DistillationConfig(**{**reference.DEFAULTS, **CONFIG}), {"progress": False}
    history = []
    save = reference.Checkpoints.save
    monkeypatch.setattr(reference.Checkpoints, "save", lambda *a: history.append(list(a[4]["prototype"])) or save(*a))
    whole = reference.train(tiny_backbone(), sets, config, tmp_path / "whole", **options)
    noisy = history[-1][::2]  # every other step is of the first set
    assert len(history[-1]) == 30 and sum(noisy[-5:]) < sum(noisy[:5])

    def killed(self, parameters, optimizer, step, *rest):
        save(self, parameters, optimizer, step, *rest)
        if step == 20:
            raise KeyboardInterrupt

    monkeypatch.setattr(reference.Checkpoints, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        reference.train(tiny_backbone(), sets, config, tmp_path / "part", **options)
    monkeypatch.setattr(reference.Checkpoints, "save", save)
    part = reference.train(tiny_backbone(), sets, config, tmp_path / "part", **options)
    assert all(torch.equal(a, b) for a, b in zip(whole.trainable(), part.trainable(), strict=True))


def test_the_loss_by_hand(reference):
    config = DistillationConfig(ways=2, shots=1, queries=1, temperature=1.0)
    features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 2.0], [3.0, 0.0]])  # support, query, support, query
    right, wrong = -math.log(math.e / (math.e + 1)), -math.log(1 / (math.e + 1))
    found = reference.episode_loss(features, config).item()
    assert abs(found - (right + wrong) / 2) < 1e-6


def test_an_episode_has_its_ways_and_no_image_twice(reference, sets):
    config = DistillationConfig(ways=3, shots=2, queries=3)
    data = LabelledImages(torch.arange(40).view(40, 1, 1, 1), torch.arange(40) // 10, list("abcd"), "numbers")
    drawn = reference.draw_episode(data, data.by_class(), config, torch.Generator().manual_seed(0)).flatten()
    ways = (drawn // 10).view(3, 5)
    assert len(drawn.unique()) == 15 and (ways == ways[:, :1]).all() and len(ways[:, 0].unique()) == 3
