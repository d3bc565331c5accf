"""Folding, averaging and grouping, each against the same thing done with dense matrices."""

import shutil

import pytest
import torch
from helpers_adapters import CONFIGS, edit_config, edit_tensors, save_adapter
from helpers_tiny import copied_state, planted_adapter, random_factors, same_weights, tiny_backbone, tiny_processor

from lora_recycle.backbones import Backbone
from lora_recycle.errors import AdapterError
from lora_recycle.pool import AdapterPool, truncate


Q0, FC1 = "layers.0.attention.q_proj", "layers.1.mlp.fc1"


@pytest.fixture
def mixed():
    """Three adapters of other ranks and targets on one backbone."""
    backbone = tiny_backbone()
    shapes = [{Q0: (32, 2, 32)}, {Q0: (32, 5, 32), FC1: (64, 3, 32)}, {FC1: (64, 1, 32)}]
    adapters = [planted_adapter(f"a{i}", random_factors(s, seed=i)) for i, s in enumerate(shapes)]
    return AdapterPool(backbone, adapters)


def dense(adapter, module, shape):
    b, a = adapter.factors.get(module, (torch.zeros(shape[0], 1), torch.zeros(1, shape[1])))
    return b @ a


def dense_mean(pool, module):
    shape = pool.backbone.model.get_submodule(module).weight.shape
    return torch.stack([dense(adapter, module, shape) for adapter in pool.adapters]).mean(0)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "pattern", "rslora", "lokr", "ia3", "ln_tuning"])
def test_a_folded_adapter_gives_the_logits_of_its_peft_model(tmp_path, kind):
    model, twin = save_adapter(tmp_path, CONFIGS[kind])
    x = torch.randn(3, 3, 32, 32)
    expected = model(pixel_values=x).logits
    pool = AdapterPool.from_pretrained(tmp_path, backbone=Backbone(twin, tiny_processor(), "twin"))
    bare = pool.backbone.features(x)
    with pool.folded(0) as backbone:
        hidden, _ = backbone(x)
        torch.testing.assert_close(pool[0].logits(backbone, hidden), expected, rtol=1e-4, atol=1e-4)
        assert (backbone.features(x) - bare).abs().max() > 1e-2


@torch.no_grad()
def test_trained_biases_of_a_lora_are_not_lost(tmp_path):
    from peft import LoraConfig

    config = LoraConfig(r=4, lora_bias=True, target_modules=["q_proj", "fc1"], modules_to_save=["classifier"])
    model, twin = save_adapter(tmp_path, config)
    x = torch.randn(2, 3, 32, 32)
    expected = model(pixel_values=x).logits
    pool = AdapterPool.from_pretrained(tmp_path, backbone=Backbone(twin, tiny_processor(), "twin"))
    with pool.folded(0) as backbone:
        logits = pool[0].logits(backbone, backbone(x)[0])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_weights_come_back_bit_by_bit(mixed, tiny_pool):
    for pool in (mixed, tiny_pool):
        before = copied_state(pool.backbone)
        with pool.folded(0) as backbone:
            assert not same_weights(backbone, before)
        assert same_weights(pool.backbone, before)
        with pytest.raises(RuntimeError, match="stop"), pool.folded():
            raise RuntimeError("stop")
        assert same_weights(pool.backbone, before)


def test_weights_come_back_after_an_adapter_that_does_not_fit(mixed):
    before = copied_state(mixed.backbone)
    bad = planted_adapter("bad", {Q0: mixed[0].factors[Q0], FC1: (torch.zeros(5, 1), torch.zeros(1, 7))})
    with pytest.raises(RuntimeError), mixed.folded([bad]):
        pass
    assert same_weights(mixed.backbone, before)


def test_folding_all_adds_the_mean_of_the_changes(mixed):
    before = copied_state(mixed.backbone.model)
    with mixed.folded() as backbone:
        for module in (Q0, FC1):
            change = backbone.model.get_submodule(module).weight - before[f"{module}.weight"]
            torch.testing.assert_close(change, dense_mean(mixed, module), rtol=1e-4, atol=1e-5)


def test_biases_and_norms_are_folded_and_averaged(tmp_path):
    for i in (0, 1):
        save_adapter(tmp_path / f"a{i}", CONFIGS["ln_tuning"] if i == 0 else CONFIGS["lora"])
    _, twin = save_adapter(tmp_path / "spare")
    pool = AdapterPool.from_pretrained(
        [tmp_path / "a0", tmp_path / "a1"], backbone=Backbone(twin, tiny_processor(), "t")
    )
    name = "layers.0.layernorm_before.bias"
    before = copied_state(pool.backbone.model)[name]
    with pool.folded() as backbone:
        change = copied_state(backbone.model)[name] - before
    torch.testing.assert_close(change, pool[0].others[name] / 2)


@pytest.mark.parametrize("rank", [None, 1, 3])
def test_the_average_is_that_of_the_changes(mixed, rank):
    average = mixed.average(rank)
    assert sorted(average) == [Q0, FC1]
    for module, (b, a) in average.items():
        u, s, vh = torch.linalg.svd(dense_mean(mixed, module), full_matrices=False)
        k = rank or len(s)
        torch.testing.assert_close(b @ a, u[:, :k] * s[:k] @ vh[:k], rtol=1e-4, atol=1e-5)
        assert b.shape[1] == a.shape[0] and (rank is None or b.shape[1] == rank)


def test_the_average_of_some(mixed):
    b, a = mixed.average(indices=[1, 2])[Q0]
    torch.testing.assert_close(b @ a, dense(mixed[1], Q0, (32, 32)) / 2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("inner", [3, 40])
def test_truncation_is_the_dense_one(inner):
    b, a = torch.randn(24, inner), torch.randn(inner, 16)
    small_b, small_a = truncate(b, a, 2)
    u, s, vh = torch.linalg.svd(b @ a, full_matrices=False)
    torch.testing.assert_close(small_b @ small_a, u[:, :2] * s[:2] @ vh[:2], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(small_b.norm(dim=0), small_a.norm(dim=1))  # the spectrum is shared out evenly
    full_b, full_a = truncate(b, a, None)
    torch.testing.assert_close(full_b @ full_a, b @ a, rtol=1e-3, atol=1e-3)


def test_similarity_is_that_of_the_dense_changes(mixed):
    shapes = {Q0: (32, 32), FC1: (64, 32)}
    for i, one in enumerate(mixed.adapters):
        for j, two in enumerate(mixed.adapters):
            shared = sorted(one.factors.keys() & two.factors.keys())
            pairs = [(dense(one, m, shapes[m]).flatten(), dense(two, m, shapes[m]).flatten()) for m in shared]
            cosines = [torch.cosine_similarity(x, y, dim=0).item() for x, y in pairs]
            expected = sum(cosines) / len(cosines) if cosines else 0.0
            assert mixed.similarity()[i, j].item() == pytest.approx(expected, abs=1e-5)
    assert mixed.similarity()[0, 2] == 0  # no layer in common


def test_groups_separate_planted_clusters():
    centres = [random_factors({Q0: (32, 4, 32)}, seed=100 + c)[Q0] for c in range(2)]
    adapters, planted = [], [0, 1, 0, 0, 1, 0, 1]
    for i, cluster in enumerate(planted):
        b, a = centres[cluster]
        noise = random_factors({Q0: (32, 4, 32)}, seed=i, scale=0.05)[Q0][0]
        adapters.append(planted_adapter(f"a{i}", {Q0: (b + noise, a)}))
    pool = AdapterPool(tiny_backbone(), adapters)
    assert pool.groups() == [[0, 2, 3, 5], [1, 4, 6]]
    assert pool.subset([0, 2, 3, 5]).groups() == [[0, 1, 2, 3]]
    assert pool.subset([0, 1]).groups() == [[0, 1]]


def test_a_randomised_pool_keeps_norms_and_nothing_else(mixed):
    control, again = mixed.randomized(3), mixed.randomized(3)
    for adapter, random, same in zip(mixed.adapters, control.adapters, again.adapters, strict=True):
        assert random.factors.keys() == adapter.factors.keys()
        for module, (b, a) in adapter.factors.items():
            new_b, new_a = random.factors[module]
            torch.testing.assert_close(torch.linalg.norm(new_b @ new_a), torch.linalg.norm(b @ a))
            assert new_b.shape == b.shape and torch.equal(new_b, same.factors[module][0])
            cosine = torch.cosine_similarity((new_b @ new_a).flatten(), (b @ a).flatten(), dim=0)
            assert cosine.abs() < 0.3
    assert not torch.equal(mixed.randomized(4)[0].factors[Q0][0], control[0].factors[Q0][0])


def test_adapters_of_other_bases_make_no_pool(tmp_path):
    for name in ("one", "two"):
        save_adapter(tmp_path / name)
        edit_config(tmp_path / name, base_model_name_or_path=f"someone/{name}")
    with pytest.raises(AdapterError, match="one is made for someone/one and two for someone/two"):
        AdapterPool.from_pretrained(tmp_path)


def test_an_adapter_that_names_no_base_needs_one_given(tmp_path):
    _, twin = save_adapter(tmp_path / "one")
    edit_config(tmp_path / "one", base_model_name_or_path=None)
    with pytest.raises(AdapterError, match="names no base model"):
        AdapterPool.from_pretrained(tmp_path)
    assert len(AdapterPool.from_pretrained(tmp_path, backbone=Backbone(twin, tiny_processor(), "t"))) == 1


def test_an_empty_pool_is_refused():
    with pytest.raises(AdapterError, match="at least one adapter"):
        AdapterPool(tiny_backbone(), [])


def test_an_adapter_without_a_head_has_no_logits(mixed):
    assert mixed[0].num_classes == 0
    with pytest.raises(AdapterError, match="a0: has no classification head"):
        mixed[0].logits(mixed.backbone, torch.zeros(1, 17, 32))


def test_heads_that_do_not_fit_are_skipped_where_heads_are_required(tiny_pool_path, tmp_path):
    shutil.copytree(tiny_pool_path / "adapter-0", tmp_path / "good")
    shutil.copytree(tiny_pool_path / "adapter-1", tmp_path / "wide")
    head = "base_model.model.classifier.weight"
    edit_tensors(tmp_path / "wide", lambda tensors: tensors | {head: torch.zeros(4, 64)})
    assert len(AdapterPool.from_pretrained(tmp_path)) == 2  # for an average heads do not matter
    with pytest.raises(AdapterError, match="^wide: its head reads 64 features, .* gives 32"):
        AdapterPool.from_pretrained(tmp_path, require_heads=True)
    with pytest.warns(UserWarning, match="1 of 2 adapters are skipped:\n- wide: its head reads 64"):
        pool = AdapterPool.from_pretrained(tmp_path, require_heads=True, on_error="skip")
    assert [adapter.info.name for adapter in pool.adapters] == ["good"] and pool.skipped[0][0] == "wide"
