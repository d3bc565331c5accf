"""Features on disk: another table costs no forward, and what is not the same network or image is not taken for it."""

import copy

import peft
import pytest
import torch
from helpers_tiny import TINY_LAYERS, random_pixels, tiny_backbone

from lora_recycle import EvaluationConfig, evaluate
from lora_recycle.adapters.peft_wrap import wrap
from lora_recycle.adapters.trainable import wrap_seeded
from lora_recycle.evaluation import engine as engine_module
from lora_recycle.evaluation.stored_features import NetworkFeatures, StoredFeatures, network_sha256
from lora_recycle.images.labelled import LabelledImages


SMALL = {"ways": 4, "shots": (1,), "episodes": 20, "queries": 5}
#: Methods that merge, that ask every adapter, and one that routes tokens by hooks.
METHODS = ("average", "ensemble", "ties", "arrow")


@pytest.fixture
def forwards(monkeypatch):
    """How many images each call forwarded."""
    counts, extract = [], engine_module.extract_features

    def counted(backbone, images, *rest):
        counts.append(len(images))
        return extract(backbone, images, *rest)

    monkeypatch.setattr(engine_module, "extract_features", counted)
    return counts


def test_a_second_table_costs_no_forward(toy_data, tiny_pool, forwards, tmp_path):
    def table(**changes):
        forwards.clear()
        config = EvaluationConfig(**SMALL | changes, methods=METHODS)
        found = evaluate(toy_data, None, config, pool=tiny_pool, features_dir=tmp_path)
        return found.rows, list(forwards)

    plain = evaluate(toy_data, None, EvaluationConfig(**SMALL, methods=METHODS), pool=tiny_pool).rows
    rows, first = table()
    assert rows == plain and first == [160] * (len(tiny_pool) + 4)
    rows, second = table()
    assert rows == plain and second == [160]  # arrow's hooks have no checksum
    other, third = table(shots=(2, 3), seed=1, ways=3)
    assert len(other) == 2 * len(rows) and third == [160]
    assert len(list(tmp_path.iterdir())) == len(tiny_pool) + 3


def test_costs_come_back_and_are_measured_where_they_are_missing(toy_data, tiny_pool, tmp_path):
    from lora_recycle.fewshot.episodes import sample_episodes

    def engine(*shots):
        drawn = {k: sample_episodes(toy_data.labels, 4, k, 5, 20, 0) for k in shots}
        stored = StoredFeatures(tmp_path, toy_data)
        return engine_module.EvaluationEngine(toy_data, drawn, tiny_pool.backbone, tiny_pool, {}, stored=stored)

    first, again = (engine(1).result("average", 1) for _ in range(2))
    assert torch.equal(first.accuracies, again.accuracies) and again.peak_memory_mb == first.peak_memory_mb > 0
    assert again.seconds_per_task == pytest.approx(first.seconds_per_task, rel=0.9)
    assert engine(1, 3).result("average", 3).peak_memory_mb > first.peak_memory_mb
    assert StoredFeatures(tmp_path, toy_data).load(next(tmp_path.iterdir())).bytes.keys() == {1, 3}


def test_other_images_other_weights_and_damage_are_seen(toy_data, tmp_path):
    network, stored = tiny_backbone(), StoredFeatures(tmp_path, toy_data)
    path = stored.path(network)
    assert stored.load(path) is None
    stored.save(path, NetworkFeatures(torch.randn(160, 32), 0.5, {1: 7}))
    found = stored.load(path)
    assert found.features.shape == (160, 32) and (found.seconds, found.bytes) == (0.5, {1: 7})
    assert stored.path(tiny_backbone()) == path  # the same weights, made again
    assert stored.path(tiny_backbone(seed=1)) != path
    pixels = toy_data.pixels.clone()
    pixels[3, 0, 0, 0] ^= 1
    other = LabelledImages(pixels, toy_data.labels, toy_data.label_names, "toy")
    assert StoredFeatures(tmp_path, other).path(network) != path
    fewer = LabelledImages(random_pixels(8), torch.arange(8), [str(i) for i in range(8)], "few")
    assert StoredFeatures(tmp_path, fewer).load(path) is None
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert stored.load(path) is None


def wrapped(kind, **changes):
    """A tiny network that PEFT wrapped, its random numbers of a seed."""
    network = tiny_backbone()
    wrap_seeded(network.model, kind(target_modules=TINY_LAYERS, **changes), 0)
    return network


def test_what_adapters_hold_beside_their_weights_counts():
    plain = network_sha256(wrapped(peft.LoraConfig, r=2, lora_alpha=2))
    assert plain == network_sha256(wrapped(peft.LoraConfig, r=2, lora_alpha=2)) != network_sha256(tiny_backbone())
    assert plain != network_sha256(wrapped(peft.LoraConfig, r=2, lora_alpha=4))  # a scale, which is no tensor
    seeds = [network_sha256(wrapped(peft.ShiraConfig, r=2, random_seed=seed)) for seed in (0, 0, 1)]
    assert seeds[0] == seeds[1] != seeds[2]  # the entries that change, which are in no state_dict
    network = tiny_backbone()
    model = wrap(network.model, peft.LoraConfig(r=2, target_modules=TINY_LAYERS))
    on = network_sha256(network)
    with model.disable_adapter():
        assert network_sha256(network) != on


def test_a_network_with_hooks_or_replaced_methods_has_no_checksum():
    network = tiny_backbone()
    layer = network.layers[0]
    handle = layer.register_forward_hook(lambda *_: None)
    assert network_sha256(network) is None
    handle.remove()
    assert network_sha256(network) is not None
    layer.forward = copy.copy(layer.forward)
    assert network_sha256(network) is None
