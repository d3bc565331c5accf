"""Tuning on a support set: where each method starts, what it learns, and that nothing stays for the next task."""

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers_tiny import copied_state, random_pixels, same_weights

from lora_recycle.backbones.backbone import extract_features
from lora_recycle.errors import ConfigError, DataError
from lora_recycle.fewshot.prototypes import class_prototypes, prototype_logits
from lora_recycle.finetuning import (
    LearnedComposition,
    LinearProbe,
    LoRAHub,
    RoutingTuning,
    TaskNetwork,
    TaskTuningConfig,
    tune_task,
    tuning_methods,
)
from lora_recycle.finetuning.base import leave_one_out_logits
from lora_recycle.finetuning.lorahub import BOUND, search
from lora_recycle.finetuning.mixture import AdapterMixture
from lora_recycle.merging import Average


WAYS, LABELS = 3, torch.arange(3).repeat_interleave(2)
METHODS = tuning_methods()
FROM_AVERAGE = ("average-lora", "learned-composition", "mhr-z", "mhr-mu")  # they take a rank


@pytest.fixture(scope="module")
def task(toy_data):
    """Support of 3 classes with 2 images each, 9 queries, their labels; noisy, so that there is something to learn."""
    noisy = (toy_data.pixels.float() * 0.1 + random_pixels(160).float() * 0.9).to(torch.uint8)
    support = torch.cat([noisy[c * 20 : c * 20 + 2] for c in range(WAYS)])
    return support, torch.cat([noisy[c * 20 + 2 : c * 20 + 5] for c in range(WAYS)])


def left_out_loss(network, tokens, labels=LABELS):
    return F.cross_entropy(leave_one_out_logits(network.features(tokens), labels, WAYS), labels)


def untuned(name):
    config = TaskTuningConfig(**{**type(METHODS[name]).defaults, "steps": 1 if name == "lorahub" else 0})
    # ranks high enough for DoRA's and LoHa's dense changes
    options = {"rank": 32} if name in FROM_AVERAGE else {}
    return type(METHODS[name])(config, **options)


@pytest.mark.parametrize("name", METHODS)
def test_without_steps_it_is_the_prototypes_that_it_starts_from(tiny_pool, task, name):
    support, queries = task
    method = untuned(name)
    found = method.config.temperature * method.classify(tiny_pool, support, LABELS, queries)
    if name == "average-linear" or name in FROM_AVERAGE:
        kind = Average() if name == "average-linear" else Average(rank=32)  # no biases in a LoRA
        expected = kind.classify(tiny_pool, support, LABELS, queries)
    else:
        shots, asked = (extract_features(tiny_pool.backbone, images) for images in task)
        expected = prototype_logits(asked, class_prototypes(shots, LABELS, WAYS))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_it_learns_the_support_set_and_forgets_it(tiny_pool, task, name):
    support, queries = task
    before = copied_state(tiny_pool.backbone)
    changed = {"steps": 8, **({"lr": 1e-3} if name == "full-tuning" else {})}
    method = type(METHODS[name])(TaskTuningConfig(**{**type(METHODS[name]).defaults, **changed}))
    network = method.network(tiny_pool)
    tokens, asked = network.tokens(support), network.tokens(queries)
    first = method.scores(network, tokens, LABELS, WAYS, asked)
    swapped = method.scores(network, tokens, LABELS.flip(0), WAYS, asked)
    again = method.scores(network, tokens, LABELS, WAYS, asked)
    assert torch.equal(first, again) and not torch.equal(first, swapped)
    start = untuned(name).classify(tiny_pool, support, LABELS, support)
    tuned = method.scores(network, tokens, LABELS, WAYS, tokens)
    if name == "lorahub":  # it sees each image without itself
        tuned = left_out_loss(network, tokens)
        network.reset()
        assert tuned <= left_out_loss(network, tokens)
    else:
        assert F.cross_entropy(tuned, LABELS) < F.cross_entropy(start, LABELS) - 1e-3
    assert same_weights(tiny_pool.backbone, before)
    assert not any(p.requires_grad for p in tiny_pool.backbone.parameters())


def test_what_does_not_learn_may_be_computed_once(tiny_pool, task):
    found = []
    for last in (1, None):  # the same weights learn; the tokens are those after the first layer, or before it
        backbone = copy.deepcopy(tiny_pool.backbone)
        network = TaskNetwork(backbone, backbone.layers[1].parameters(), last)
        tokens = network.tokens(task[0])
        found.append(tune_task(network, tokens, LABELS, WAYS, TaskTuningConfig(steps=3, lr=1e-3)))
        found.append(network.features(tokens))
    torch.testing.assert_close(found[0], found[2], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[1], found[3], atol=1e-5, rtol=1e-4)


def test_consistency_holds_the_embeddings(tiny_pool, task):
    moved = []
    for weight in (0.0, 100.0):
        backbone = copy.deepcopy(tiny_pool.backbone)
        network = TaskNetwork(backbone, backbone.layers[1].parameters(), 1)
        tokens = network.tokens(task[0])
        start = network.features(tokens)
        tune_task(network, tokens, LABELS, WAYS, TaskTuningConfig(steps=10, lr=1e-3, consistency=weight))
        moved.append(1 - F.cosine_similarity(network.features(tokens), start).mean().item())
    assert moved[1] < moved[0] / 3


def test_a_mixture_of_one_adapter_is_that_adapter(tiny_pool, task):
    one_hot = torch.tensor([0.0, 1.0, 0.0])  # of the adapters 0, 1 and 3
    network = AdapterMixture(tiny_pool, [0, 1, 3], lambda module: one_hot, [], rank=32)
    with tiny_pool.folded(1) as backbone:
        expected = extract_features(backbone, task[0])
    torch.testing.assert_close(network.features(network.tokens(task[0])), expected, atol=1e-5, rtol=1e-4)


def test_learned_composition_gives_each_layer_its_own_weights(tiny_pool, task):
    network = LearnedComposition().network(tiny_pool)
    tune_task(network, network.tokens(task[0]), LABELS, WAYS, TaskTuningConfig(steps=3, lr=0.1))
    learned = [p for p in network.parameters if p.any()]
    assert len(learned) > 1 and all(p.shape == (len(tiny_pool),) for p in learned)
    assert not torch.equal(learned[0], learned[1])


def test_routing_gives_each_block_of_outputs_its_own_weights(tiny_pool):
    """Two heads: the first half of a layer's outputs from one adapter, the second half from the other."""
    pool = tiny_pool.subset([0, 1])
    module = min(set(pool[0].factors) & set(pool[1].factors))
    network = RoutingTuning(heads=2, rank=32).network(pool)
    modules = sorted({m for adapter in pool for m in adapter.factors})
    with torch.no_grad():  # sigmoid(50) = 1 and sigmoid(-50) = 0
        network.parameters[modules.index(module)].copy_(torch.tensor([[50.0, -50.0], [-50.0, 50.0]]))
    b, a, owner = network.modules[module]
    found = (b * network.weights(module)[..., owner]) @ a
    first, second = (x[0] @ x[1] for x in (pool[i].factors[module] for i in range(2)))
    half = len(found) // 2
    torch.testing.assert_close(found, torch.cat([first[:half], second[half:]]), atol=1e-5, rtol=1e-4)
    # a weight is the share of a sigmoid: 3/4 and 1/2 of logits log 3 and 0 make 0.6 and 0.4
    with torch.no_grad():
        network.parameters[modules.index(module)].copy_(torch.tensor([[3.0, 1.0]]).log().expand(2, 2))
    torch.testing.assert_close(network.weights(module), torch.tensor([[0.6, 0.4]]).expand(2 * half, 2))


def test_the_search_of_lorahub_finds_the_minimum_within_its_bounds():
    target, points = torch.tensor([0.5, -1.0, 0.2]), []
    found = search(lambda w: points.append(w) or float((w - target).square().sum()), 3, 60, seed=0)
    torch.testing.assert_close(found, target, atol=0.02, rtol=0)
    assert len(points) == 60 and not points[0].any() and torch.stack(points).abs().max() <= BOUND
    outside = search(lambda w: float((w - 9).square().sum()), 3, 60, seed=0)
    assert outside.max() <= BOUND and outside.mean() > 1.2
    assert torch.equal(found, search(lambda w: float((w - target).square().sum()), 3, 60, seed=0))
    assert not search(lambda w: 1.0, 3, 0, seed=0).any()


def test_lorahub_names_its_extra(tiny_pool, monkeypatch):
    monkeypatch.setitem(sys.modules, "nevergrad", None)
    with pytest.raises(ConfigError, match=r"pip install 'lora-recycle\[lorahub\]'"):
        LoRAHub().network(tiny_pool)


def test_the_logits_leave_each_image_out_of_its_own_prototype():
    features = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    labels = torch.tensor([0, 0, 1])  # the last one is alone and stays in
    prototype, other = F.normalize(torch.tensor([0.8, 0.4]), dim=0), torch.tensor([0.0, 1.0])
    logits = torch.tensor([[0.6, 0.0], [0.6, 0.8], [float(prototype @ other), 1.0]]) / 0.1
    torch.testing.assert_close(leave_one_out_logits(features, labels, 2), logits)
    distances = -torch.tensor([[0.8**0.5 * 1.0, 2**0.5], [0.8**0.5, 0.4**0.5], [(0.64 + 0.36) ** 0.5, 0.0]])
    distances[:2, 0] = -((0.4**2 + 0.8**2) ** 0.5)  # to each other
    torch.testing.assert_close(leave_one_out_logits(features, labels, 2, "euclidean", 1.0), distances)


def test_leave_one_out_tunes_the_network_and_keeps_means(tiny_pool, task):
    config = TaskTuningConfig(steps=8, lr=3e-3, temperature=0.1, leave_one_out=True)
    backbone = copy.deepcopy(tiny_pool.backbone)
    network = TaskNetwork(backbone, backbone.layers[1].parameters(), 1)
    tokens = network.tokens(task[0])
    with torch.no_grad():
        before = left_out_loss(network, tokens)
        prototypes = tune_task(network, tokens, LABELS, WAYS, config)
        assert left_out_loss(network, tokens) < before - 0.01
        torch.testing.assert_close(prototypes, class_prototypes(network.features(tokens), LABELS, WAYS))


def test_leave_one_out_needs_company(tiny_pool, task):
    """Where all images are alone in their class nothing is tuned; one that is alone adds nothing to the loss."""
    config = TaskTuningConfig(steps=3, lr=3e-3, temperature=0.1, leave_one_out=True)
    backbone = copy.deepcopy(tiny_pool.backbone)
    network = TaskNetwork(backbone, backbone.layers[1].parameters(), 1)
    tokens, alone = network.tokens(task[0])[::2], torch.arange(3)
    with torch.no_grad():
        start = network.features(tokens)
        assert torch.equal(tune_task(network, tokens, alone, WAYS, config), start)
        assert torch.equal(network.features(tokens), start)
        assert not torch.equal(tune_task(network, tokens, torch.tensor([0, 0, 1]), 2, config)[1], start[2])
    network = TaskNetwork(backbone, last_layers=0)
    features = network.tokens(task[0])
    with torch.no_grad():  # nothing can learn
        assert torch.equal(
            tune_task(network, features, LABELS, WAYS, config), class_prototypes(features, LABELS, WAYS)
        )


def test_wrong_settings_and_labels(tiny_pool, task):
    with pytest.raises(ConfigError, match="candidates must be at least 1, got 0"):
        LoRAHub(candidates=0)
    with pytest.raises(ConfigError, match="heads must be at least 1, got 0"):
        RoutingTuning(heads=0)
    for wrong in ({"steps": -1}, {"lr": -1.0}, {"temperature": 0.0}, {"last_layers": -1}, {"metric": "l1"}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            TaskTuningConfig(**wrong)
    for labels in (torch.zeros(6, dtype=torch.long), torch.tensor([0, 0, 2, 2, 3, 3]), torch.tensor([0, 1])):
        with pytest.raises(DataError, match="6 support images"):
            LinearProbe().classify(tiny_pool, task[0], labels, task[1])
