"""Who is heard: token by token (Arrow), task by task (the nearest group), or everyone (the ensemble)."""

import pytest
import torch
import torch.nn.functional as F
from helpers_tiny import copied_state, planted_adapter, random_factors, same_weights, tiny_backbone
from peft.tuners.lora.arrow import ArrowLoraLinearLayer
from peft.tuners.lora.config import ArrowConfig

from lora_recycle.backbones.backbone import extract_features
from lora_recycle.errors import AdapterError, ConfigError, DataError
from lora_recycle.fewshot.domains import separability
from lora_recycle.inversion.config import InversionConfig
from lora_recycle.inversion.inverter import LoRAInverter
from lora_recycle.merging import (
    Arrow,
    ClassStatistics,
    Ensemble,
    NearestGroup,
    RandomAverage,
    shuffled_heads,
)
from lora_recycle.merging.arrow import first_direction
from lora_recycle.pool.pool import AdapterPool


Q0, FC1 = "layers.0.attention.q_proj", "layers.1.mlp.fc1"


def outputs(network, module, x):
    """What one linear layer of a network makes of x."""
    with network as backbone, torch.no_grad():
        return backbone.model.get_submodule(module)(x)


def test_arrow_is_pefts_where_peft_routes():
    adapters = []
    for i in range(4):
        b, a = random_factors({Q0: (32, 3, 32)}, seed=i)[Q0]
        b[:, 0] *= 10  # a clear first direction, so that PEFT's power iteration arrives
        adapters.append(planted_adapter(f"a{i}", {Q0: (b, a)}))
    pool, x = AdapterPool(tiny_backbone(), adapters), torch.randn(2, 5, 32)
    config = ArrowConfig(top_k=2, router_temperature=0.7, rng_seed=0)
    names = [f"task_{i}" for i in range(4)]
    config.task_adapter_names = names
    theirs = ArrowLoraLinearLayer(32, config)
    layers = [{}, {}]
    for name, adapter in zip(names, adapters, strict=True):
        for side, factor in zip(layers, reversed(adapter.factors[Q0]), strict=True):
            side[name] = torch.nn.Linear(*reversed(factor.shape), bias=False)
            side[name].weight.data = factor
    theirs.build_prototypes(*layers)
    with torch.no_grad():
        delta = theirs(x, *layers, torch.nn.Identity(), dict.fromkeys(names, 1.0))
        expected = pool.backbone.model.get_submodule(Q0)(x) + delta
    (network,) = Arrow(top_k=2, temperature=0.7).networks(pool)
    torch.testing.assert_close(outputs(network, Q0, x), expected, rtol=1e-4, atol=1e-4)


def test_arrow_by_hand_with_mixed_ranks_and_targets():
    """Two adapters that listen to other inputs: a token hears the one whose direction it points along."""
    first, second = torch.eye(32)[:1], torch.eye(32)[1:4] * torch.tensor([[3.0], [1.0], [1.0]])
    adapters = [
        planted_adapter("a", {Q0: (torch.ones(32, 1), first), FC1: (torch.ones(64, 1), first)}),
        planted_adapter("b", {Q0: (torch.ones(32, 3), second)}),
    ]
    pool, x = AdapterPool(tiny_backbone(), adapters), torch.zeros(1, 2, 32)
    before = copied_state(pool.backbone)
    x[0, 0, 0], x[0, 1, 1] = -2.0, 2.0
    bare, (network,) = pool.backbone.model.get_submodule(Q0)(x), Arrow(top_k=1).networks(pool)
    added = outputs(network, Q0, x) - bare
    torch.testing.assert_close(added[0], torch.tensor([[-2.0], [6.0]]).expand(2, 32))
    (network,) = Arrow(top_k=5).networks(pool)  # both; the second's direction is (3, 1, 1) / sqrt(11) in its three
    shares = torch.tensor([2.0, 6 / 11**0.5]).sigmoid()[:, None]
    added = outputs(network, Q0, x) - bare
    torch.testing.assert_close(added[0], shares * torch.tensor([[-2.0], [6.0]]).expand(2, 32))
    (network,) = Arrow().networks(pool)
    bare = pool.backbone.model.get_submodule(FC1)(x)
    torch.testing.assert_close((outputs(network, FC1, x) - bare)[0, 0], torch.full((64,), -2.0))  # one owner
    assert same_weights(pool.backbone, before)


@pytest.mark.parametrize("shapes", [(24, 3, 16), (24, 40, 16), (8, 8, 16)])
def test_the_first_direction_is_that_of_the_dense_change(shapes):
    b, a = torch.randn(shapes[0], shapes[1]), torch.randn(shapes[1], shapes[2])
    cosine = torch.dot(first_direction(b, a), torch.linalg.svd(b @ a).Vh[0])
    assert abs(cosine.item()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("settings", [{"top_k": 0}, {"temperature": 0.0}, {"temperature": float("nan")}])
def test_routing_settings_out_of_range(settings):
    with pytest.raises(ConfigError, match="top_k must be at least 1 and temperature above 0"):
        Arrow(**settings)


@pytest.mark.parametrize("shots", [1, 3])
def test_the_nearest_group_decides_alone(mixed, monkeypatch, images, shots):
    monkeypatch.setattr(mixed, "groups", lambda: [[0, 1], [2]])
    support, queries = images[: 2 * shots], images
    labels = torch.arange(2).repeat(shots)
    scores = NearestGroup().classify(mixed, support, labels, queries)
    near, expected = [], []
    for group in ([0, 1], [2]):
        with mixed.folded([mixed[i] for i in group]) as backbone:
            shots_seen, asked = extract_features(backbone, support), extract_features(backbone, queries)
        near.append(separability(shots_seen, labels))
        prototypes = torch.stack([shots_seen[labels == c].mean(0) for c in (0, 1)])
        expected.append(F.cosine_similarity(asked[:, None], prototypes[None], dim=-1))
    best = 0 if near[0] > near[1] else 1
    assert abs(near[0] - near[1]) > 1e-4
    torch.testing.assert_close(scores, expected[best], rtol=1e-4, atol=1e-5)
    assert (scores - expected[1 - best]).abs().max() > 1e-3


def test_in_the_ensemble_all_are_heard(mixed, images):
    support, labels, expected = images[:2], torch.tensor([1, 0]), []
    scores = Ensemble().classify(mixed, support, labels, images[2:])
    for i in range(3):
        with mixed.folded(i) as backbone:
            prototypes = extract_features(backbone, support).flip(0)
            expected.append(
                F.cosine_similarity(extract_features(backbone, images[2:])[:, None], prototypes[None], dim=-1)
            )
    torch.testing.assert_close(scores, torch.stack(expected).mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("labels", [[0, 2], [1, 2], [0], [], [-1, 0]])
@pytest.mark.parametrize("method", [Ensemble(), NearestGroup(), ClassStatistics()])
def test_labels_that_number_no_classes(mixed, images, method, labels):
    with pytest.raises(DataError, match="labels of 2 support images must"):
        method.classify(mixed, images[:2], torch.tensor(labels, dtype=torch.long), images)


def test_the_random_control_is_the_average_of_a_random_pool(mixed, images):
    (network,) = RandomAverage(seed=3).networks(mixed)
    with network as backbone:
        features = extract_features(backbone, images)
    with mixed.randomized(3).folded() as backbone:
        assert torch.equal(features, extract_features(backbone, images))


def test_shuffled_heads_leave_no_adapter_its_own(tiny_pool):
    control, again = shuffled_heads(tiny_pool, seed=1), shuffled_heads(tiny_pool, seed=1)
    heads = [adapter.head.weight for adapter in tiny_pool]
    for i, adapter in enumerate(control):
        assert torch.equal(adapter.factors[Q0][0], tiny_pool[i].factors[Q0][0])
        assert adapter.info.name == tiny_pool[i].info.name
        (donor,) = [j for j, head in enumerate(heads) if torch.equal(head, adapter.head.weight)]
        assert donor != i and torch.equal(adapter.head.bias, tiny_pool[donor].head.bias)
        assert adapter.info.labels == tiny_pool[donor].info.labels
        assert adapter.info.sha256 != tiny_pool[i].info.sha256
        assert torch.equal(again[i].head.weight, adapter.head.weight)
    taken = torch.stack([adapter.head.weight[0] for adapter in control]).unique(dim=0)
    assert len(taken) == len(tiny_pool)


def test_a_pool_of_shuffled_heads_is_inverted(tiny_pool):
    control = shuffled_heads(tiny_pool)
    shard = LoRAInverter(control, InversionConfig(images_per_class=1, iterations=1)).invert(0)
    owner, donee = tiny_pool[0], control[0]
    with control.folded(0) as backbone:
        hidden = backbone(backbone.normalize(shard.pixels))[0]
        mine, donors = owner.logits(backbone, hidden), donee.logits(backbone, hidden)
    torch.testing.assert_close(shard.teacher_logits, donors.float(), rtol=1e-3, atol=1e-3)
    assert (shard.teacher_logits - mine).abs().max() > 0.1


def test_heads_need_company_to_be_shuffled(mixed):
    with pytest.raises(AdapterError, match="at least 2 adapters with a head, this pool has 0"):
        shuffled_heads(mixed)
