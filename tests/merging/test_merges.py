"""Merges of whole changes, against PEFT's functions on single tensors, numpy, and small cases by hand."""

import copy

import numpy as np
import pytest
import torch
from helpers_tiny import copied_state, planted_adapter, same_weights, tiny_backbone
from peft import LoraConfig, get_peft_model
from peft.utils import merge_utils

from lora_recycle.errors import AdapterError, ConfigError
from lora_recycle.merging import (
    Average,
    Dare,
    Ensemble,
    GroupSum,
    Knots,
    MagnitudePruning,
    Restored,
    Ties,
    Undiluted,
    make_method,
)
from lora_recycle.merging.base import dense_changes
from lora_recycle.merging.knots import shared_bases
from lora_recycle.merging.magnitude import keep_largest
from lora_recycle.pool.pool import AdapterPool


Q0, FC1 = "layers.0.attention.q_proj", "layers.1.mlp.fc1"
CPU = torch.device("cpu")


def dense_q0(pool):
    return [dense_changes(adapter, CPU)[f"{Q0}.weight"] for adapter in pool]


def only_q0(pool):
    adapters = [planted_adapter(a.info.name, {Q0: a.factors[Q0]}) for a in pool]
    return AdapterPool(pool.backbone, adapters)


def test_the_average_is_what_peft_concatenates():
    backbone, factors = tiny_backbone(), []
    model = get_peft_model(
        copy.deepcopy(backbone.model), LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"]), "one"
    )
    model.add_adapter("two", LoraConfig(r=5, lora_alpha=1, target_modules=["q_proj"]))
    layer = model.get_submodule(f"base_model.model.{Q0}")
    for name in ("one", "two"):
        torch.nn.init.normal_(layer.lora_B[name].weight)
        b, a = (side[name].weight.detach().clone() for side in (layer.lora_B, layer.lora_A))
        factors.append({Q0: (b * layer.scaling[name], a)})
    model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "both", combination_type="cat")
    pool = AdapterPool(backbone, [planted_adapter(f"a{i}", each) for i, each in enumerate(factors)])
    x, base = torch.randn(3, 32), backbone.model.get_submodule(Q0)
    with torch.no_grad():
        expected = base(x) + x @ layer.get_delta_weight("both").T
        for method in (Average(), Average(32)):
            (network,) = method.networks(pool)
            with network:
                torch.testing.assert_close(base(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("density", [0.05, 0.2, 0.7])
def test_ties_and_pruning_are_pefts_on_dense_changes(mixed, density):
    pool = only_q0(mixed)
    tensors, ones = dense_q0(pool), torch.ones(3)
    expected = merge_utils.ties(tensors, ones, density)
    torch.testing.assert_close(Ties(density).changes(pool)[f"{Q0}.weight"], expected)
    expected = merge_utils.magnitude_prune(tensors, ones / 3, density)
    torch.testing.assert_close(MagnitudePruning(density).changes(pool)[f"{Q0}.weight"], expected)


def test_ties_by_hand(planted):
    one = torch.zeros(32, 32)
    two, three = one.clone(), one.clone()
    one[0, :4] = torch.tensor([3.0, 1.0, -2.0, 5.0])
    two[0, :4] = torch.tensor([1.0, -4.0, -4.0, 0.5])
    three[0, :4] = torch.tensor([-5.0, 2.0, 3.0, 0.0])
    merged = Ties(3 / 1024).changes(planted(one, two, three))[f"{Q0}.weight"]  # three entries each are kept
    # column 0: 3 + 1 - 5 < 0, the negative alone; 1: one lost its 1, -4 + 2; 2: -2 - 4 + 3; 3: two lost its 0.5
    assert merged[0, :4].tolist() == [-5.0, -4.0, -3.0, 5.0] and merged.count_nonzero() == 4


def test_the_largest_entries_of_all_layers_together():
    kept = keep_largest({"a": torch.tensor([1.0, -4.0]), "b": torch.tensor([[3.0, 0.5]])}, 0.5)
    assert kept["a"].tolist() == [0.0, -4.0] and kept["b"].tolist() == [[3.0, 0.0]]
    assert keep_largest({"a": torch.tensor([1.0, -4.0])}, 0.1)["a"].tolist() == [0.0, -4.0]
    assert keep_largest({}, 0.5) == {}


def test_dare_keeps_the_mean_and_drops_the_rest(planted):
    pool = planted(torch.ones(32, 32), 2 * torch.ones(32, 32))
    merged = Dare(density=0.25, seed=1).changes(pool)[f"{Q0}.weight"]
    values, counts = np.unique(merged.numpy(), return_counts=True)
    assert values.tolist() == [0.0, 2.0, 4.0, 6.0]  # none, the one's 1 / 0.25 / 2, the two's, both
    np.testing.assert_allclose(counts / 1024, [0.5625, 0.1875, 0.1875, 0.0625], atol=0.05)
    assert merged.mean().item() == pytest.approx(1.5, abs=0.15)
    assert torch.equal(merged, Dare(density=0.25, seed=1).changes(pool)[f"{Q0}.weight"])
    assert not torch.equal(merged, Dare(density=0.25, seed=2).changes(pool)[f"{Q0}.weight"])


@pytest.mark.parametrize("method", [Dare(density=1.0), MagnitudePruning(density=1.0)])
def test_nothing_dropped_is_the_exact_average(mixed, method):
    merged = method.changes(mixed)
    torch.testing.assert_close(merged[f"{Q0}.weight"], torch.stack(dense_q0(mixed)).mean(0))
    torch.testing.assert_close(merged["layers.0.layernorm_before.bias"], torch.linspace(-1, 1, 32) / 3)


def test_knots_is_ties_on_the_coordinates_of_the_svd(mixed):
    pool = only_q0(AdapterPool(mixed.backbone, [mixed[0], mixed[1]]))  # joint rank 7 of 32
    tensors = dense_q0(pool)
    u, s, vh = np.linalg.svd(np.concatenate([t.numpy() for t in tensors], 1), full_matrices=False)
    u, coordinates = u[:, :7], (s[:7, None] * vh[:7]).reshape(7, 2, 32)
    parts = [torch.tensor(coordinates[:, i]) for i in range(2)]
    expected = torch.tensor(u) @ merge_utils.ties(parts, torch.ones(2), 0.3)
    torch.testing.assert_close(Knots(0.3).changes(pool)[f"{Q0}.weight"], expected, rtol=1e-3, atol=1e-4)
    assert shared_bases(pool)[f"{Q0}.weight"].shape == (32, 7)


def test_knots_of_one_adapter_is_that_adapter(planted):
    change = torch.randn(32, 32)
    torch.testing.assert_close(Knots(1.0).changes(planted(change))[f"{Q0}.weight"], change, rtol=1e-3, atol=1e-4)


def test_knots_does_not_depend_on_the_outputs_basis(planted):
    """TIES does: a rotation of all changes alike leaves what KnOTS merges, and not what TIES does."""
    one, two = torch.randn(32, 4) @ torch.randn(4, 32), torch.randn(32, 2) @ torch.randn(2, 32)
    turn, _ = torch.linalg.qr(torch.randn(32, 32))

    def gap(method):
        straight = method.changes(planted(one, two))[f"{Q0}.weight"]
        turned = method.changes(planted(turn @ one, turn @ two))[f"{Q0}.weight"]
        return (torch.linalg.norm(turn.T @ turned - straight) / torch.linalg.norm(straight)).item()

    assert gap(Knots(0.3)) < 1e-3 and gap(Ties(0.3)) > 0.1


def test_the_sum_of_the_groups_averages(planted, monkeypatch):
    pool = planted(*(i * torch.ones(32, 32) for i in (1.0, 2.0, 10.0)))
    monkeypatch.setattr(pool, "groups", lambda: [[0, 1], [2]])
    assert (GroupSum().changes(pool)[f"{Q0}.weight"] == 11.5).all()


def test_undiluted_is_the_sum_over_the_size_of_the_largest_group(planted, monkeypatch):
    pool = planted(*(i * torch.ones(32, 32) for i in (1.0, 2.0, 10.0)))
    monkeypatch.setattr(pool, "groups", lambda: [[0, 1], [2]])
    assert (Undiluted().changes(pool)[f"{Q0}.weight"] == 6.5).all()
    monkeypatch.setattr(pool, "groups", lambda: [[0, 1, 2]])
    torch.testing.assert_close(Undiluted().changes(pool)[f"{Q0}.weight"], torch.full((32, 32), 13 / 3))


def test_restored_is_the_average_with_the_largest_group_at_its_full_strength(planted, monkeypatch):
    pool = planted(*(i * torch.ones(32, 32) for i in (1.0, 2.0, 10.0, 20.0)))
    for groups, expected in (
        ([[0, 1, 2], [3]], 13 / 3 + 20 / 4),
        ([[0, 1], [2, 3]], 3 / 2 + 30 / 2),
        ([[0, 1, 2, 3]], 33 / 4),
    ):
        monkeypatch.setattr(pool, "groups", lambda groups=groups: groups)
        torch.testing.assert_close(Restored().changes(pool)[f"{Q0}.weight"], torch.full((32, 32), expected))


@pytest.mark.parametrize("method", [Ties(), Dare(), MagnitudePruning(), Knots(), GroupSum(), Undiluted(), Restored()])
def test_a_merge_is_an_adapter_that_can_be_folded_and_taken_out(mixed, method):
    before, changes = copied_state(mixed.backbone), method.changes(mixed)
    assert set(changes) == {f"{Q0}.weight", f"{FC1}.weight", "layers.0.layernorm_before.bias"}
    (network,) = method.networks(mixed)
    with network as backbone:
        state = copied_state(backbone)
        for name, change in changes.items():
            moved = state[f"model.{name}"] - before[f"model.{name}"]
            torch.testing.assert_close(moved, method.scale * change, rtol=1e-3, atol=1e-5)
    assert same_weights(mixed.backbone, before)
    merged = method.merge(mixed)
    assert merged.info.name == f"{type(method).__name__} of 3 adapters" and merged.head is None
    b, a = AdapterPool(mixed.backbone, [merged]).average(rank=4)[Q0]
    u, s, vh = torch.linalg.svd(method.scale * changes[f"{Q0}.weight"])
    torch.testing.assert_close(b @ a, u[:, :4] * s[:4] @ vh[:4], rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("rank", [None, 32])
def test_a_scaled_average_is_task_arithmetic(mixed, rank, images):
    """The sum of the three changes times 0.5: their mean times 1.5."""
    mixed[1].vector_deltas.clear()
    x, weight = mixed.backbone.normalize(images), mixed.backbone.model.get_submodule(Q0).weight
    before, added = weight.clone(), sum(0.5 * change for change in dense_q0(mixed))
    (network,) = Average(rank, scale=1.5).networks(mixed)
    with network as backbone:
        if rank is None:
            torch.testing.assert_close(weight, before + added, rtol=1e-4, atol=1e-5)
        features = backbone.features(x)
    with mixed.folded(scale=1.5) as backbone:
        torch.testing.assert_close(features, backbone.features(x), rtol=1e-3, atol=1e-4)
    assert torch.equal(weight, before)


def test_scales_are_given_by_name():
    assert make_method("ties") == Ties() and make_method("ties:0.5") == Ties(scale=0.5)
    assert make_method("dare:2", seed=3) == Dare(seed=3, scale=2.0)
    assert make_method("average-rank-16:1.5") == Average(16, scale=1.5)
    for name in ("ties:", "ties:x", "ties:0", "ties:-1", "ties:inf", "ties:nan", "ties:1:2"):
        with pytest.raises(ConfigError, match=f"'{name}': the scale must be a positive number, as in ties:0.5"):
            make_method(name)
    with pytest.raises(ConfigError, match="'ensemble:2': ensemble has no scale; average, .*undiluted.* have one"):
        make_method("ensemble:2")
    with pytest.raises(ConfigError, match="there is no method 'tie:2'"):
        make_method("tie:2")
    for kind in (Ties, Dare, Knots, MagnitudePruning, GroupSum, Average):
        with pytest.raises(ConfigError, match="scale must be positive and finite, got 0.0"):
            kind(scale=0.0)


@torch.no_grad()
@pytest.mark.parametrize("rank", [32, 4])
def test_the_average_worn_beside_the_weights(mixed, rank, images):
    mixed[1].vector_deltas.clear()
    before, x = copied_state(mixed.backbone), mixed.backbone.normalize(images)
    bare = mixed.backbone.features(x)
    (folded,), (worn,) = Average().networks(mixed), Average(rank).networks(mixed)
    with folded as backbone:
        full = backbone.features(x)
    with worn as backbone:
        assert same_weights(backbone, before)
        features = backbone.features(x)
    if rank == 32:  # all there is
        torch.testing.assert_close(features, full, rtol=1e-3, atol=1e-4)
    else:
        cut = planted_adapter("cut", mixed.average(4))
        with mixed.folded([cut]) as backbone:
            torch.testing.assert_close(features, backbone.features(x), rtol=1e-3, atol=1e-4)
        assert (features - full).abs().max() > 1e-3
    assert torch.equal(mixed.backbone.features(x), bare)


@pytest.mark.parametrize("density", [0.0, -0.1, 1.5, float("nan")])
@pytest.mark.parametrize("method", [Ties, Dare, MagnitudePruning, Knots])
def test_a_density_that_is_no_share(method, density):
    with pytest.raises(ConfigError, match="density must be in"):
        method(density=density)


@pytest.mark.parametrize("method", [Ties(), Dare(), MagnitudePruning(), Knots(), GroupSum(), Undiluted()])
def test_adapters_that_change_no_weights_are_named(method):
    adapter = planted_adapter("lily", {})
    adapter.peft_layers[Q0] = torch.nn.Linear(2, 2)
    pool = AdapterPool(tiny_backbone(), [adapter])
    with pytest.raises(AdapterError, match="lily: adapters of type LORA change no weights"):
        method.changes(pool)
    assert len(list(Ensemble().networks(pool))) == 1
