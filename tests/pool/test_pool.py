"""Reading, folding, averaging and grouping, each against the same thing done with dense matrices."""

import shutil
import weakref

import pytest
import torch
from helpers_adapters import CONFIGS, edit_config, edit_tensors, save_adapter
from helpers_tiny import copied_state, planted_adapter, random_factors, same_weights, tiny_backbone, tiny_processor

from lora_recycle.adapters import load as adapter_loading
from lora_recycle.adapters.low_rank import truncate
from lora_recycle.adapters.stored import StoredAdapter
from lora_recycle.adapters.weight_deltas import ChangeSum
from lora_recycle.backbones.backbone import Backbone
from lora_recycle.errors import AdapterError
from lora_recycle.pool.pool import AdapterPool


Q0, FC1 = "layers.0.attention.q_proj", "layers.1.mlp.fc1"


@pytest.fixture
def mixed():
    """Three adapters of other ranks and targets on one backbone."""
    backbone = tiny_backbone()
    shapes = [{Q0: (32, 2, 32)}, {Q0: (32, 5, 32), FC1: (64, 3, 32)}, {FC1: (64, 1, 32)}]
    adapters = [planted_adapter(f"a{i}", random_factors(s, seed=i)) for i, s in enumerate(shapes)]
    return AdapterPool(backbone, adapters)


@pytest.fixture
def stored(tmp_path, tiny_pool_path):
    """The tiny pool once more, from files of its own."""
    shutil.copytree(tiny_pool_path, tmp_path / "pool")
    return AdapterPool.from_pretrained(tmp_path / "pool")


def dense(adapter, module, shape):
    b, a = adapter.factors.get(module, (torch.zeros(shape[0], 1), torch.zeros(1, shape[1])))
    return b @ a


def dense_mean(pool, module):
    shape = pool.backbone.model.get_submodule(module).weight.shape
    return torch.stack([dense(adapter, module, shape) for adapter in pool]).mean(0)


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
    torch.testing.assert_close(change, pool[0].vector_deltas[name] / 2)


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
    for i, one in enumerate(mixed):
        for j, two in enumerate(mixed):
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
    for adapter, random, same in zip(mixed, control, again, strict=True):
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
    with pytest.warns(UserWarning, match="1 of 2 adapters skipped:\n- wide: its head reads 64"):
        pool = AdapterPool.from_pretrained(tmp_path, require_heads=True, on_error="skip")
    assert [info.name for info in pool.infos] == ["good"] and pool.skipped[0][0] == "wide"


def test_a_pool_of_files_reads_one_adapter_at_a_time(stored, monkeypatch):
    read, heads, most, load = [], [], 0, StoredAdapter.load

    def loading(self):
        nonlocal most
        adapter = load(self)
        heads.append(weakref.ref(adapter.head.weight))
        most = max(most, sum(head() is not None for head in heads))
        read.append(self.info.name)
        return adapter

    monkeypatch.setattr(StoredAdapter, "load", loading)
    names = [f"adapter-{i}" for i in range(4)]
    passes = (
        lambda: [info.name for info in stored.infos],
        lambda: [adapter.info.name for adapter in stored],
        stored.groups,
        lambda: stored.folded().__enter__(),
        lambda: stored.average(2),
    )
    for count, use in enumerate(passes):
        use()
        assert read == names * count
    assert most <= 2  # a loop still has the one before while the next is read
    assert [stored[3].info.name for _ in range(3)] == ["adapter-3"] * 3 and len(read) == 16


def test_what_is_read_again_is_the_same(stored, tiny_pool):
    for i in (3, 0, 2, 1, 0):
        for module, (b, a) in stored[i].factors.items():
            assert torch.equal(b, tiny_pool[i].factors[module][0]) and torch.equal(a, tiny_pool[i].factors[module][1])
        assert torch.equal(stored[i].head.weight, tiny_pool[i].head.weight)


def test_what_is_read_in_inference_mode_serves_gradients_later(stored):
    hidden = torch.zeros(1, 17, 32, requires_grad=True)
    for i in (0, 2):
        with torch.inference_mode(), stored.folded(i):
            held = stored[i]
        held.logits(stored.backbone, hidden).sum().backward()
        assert not any(t.is_inference() for factors in held.factors.values() for t in factors)
    assert hidden.grad.any()


@pytest.mark.parametrize("how", ["other numbers", "other size", "truncated", "gone"])
def test_a_file_that_changed_after_the_pool_was_made_is_refused(stored, how):
    path = stored.infos[1].path / "adapter_model.safetensors"
    if how == "other size":
        edit_tensors(path.parent, lambda tensors: {key: tensor[:1] for key, tensor in tensors.items()})
    elif how == "gone":
        path.unlink()
    else:
        data = path.read_bytes()
        path.write_bytes(data[:-4] if how == "truncated" else data[:-4] + b"1234")
    reason = {"truncated": "is truncated or damaged", "gone": "is missing"}.get(how, "changed since it was pulled")
    for use in (lambda: stored[1], stored.groups, stored.average):
        with pytest.raises(AdapterError, match=f"adapter-1: adapter_model.safetensors {reason}"):
            use()
    assert stored[2].num_classes == 4


def test_no_adapter_is_read_while_another_is_folded(stored):
    with stored.folded(0):
        assert stored[0].num_classes == 4
        with pytest.raises(AdapterError, match="adapter-1: cannot be read while an adapter is folded into"):
            stored[1]
    assert stored[1].num_classes == 4


def test_adapters_of_one_config_are_compared_with_one_model_of_peft(tmp_path, monkeypatch):
    for i in range(3):
        _, twin = save_adapter(tmp_path / f"a{i}")
    save_adapter(tmp_path / "b", CONFIGS["rslora"])
    built, wrap = [], adapter_loading.wrap
    monkeypatch.setattr(adapter_loading, "wrap", lambda *a, **k: built.append(1) or wrap(*a, **k))
    pool = AdapterPool.from_pretrained(tmp_path, backbone=Backbone(twin, tiny_processor(), "t"))
    assert len(list(pool)) == 4 and len(built) == 2
    edit_tensors(tmp_path / "a2", lambda tensors: {key: tensor[:1] for key, tensor in tensors.items()})
    with pytest.raises(AdapterError, match=r"a2: .* must be \(4, 32\), got \(1, 32\)"):
        AdapterPool.from_pretrained(tmp_path, backbone=pool.backbone)


@pytest.mark.parametrize("rank", [None, 6])
def test_the_average_of_more_ranks_than_the_weights_have(rank):
    shapes = {Q0: (32, 3, 32), FC1: (64, 5, 32)}
    pool = AdapterPool(tiny_backbone(), [planted_adapter(f"a{i}", random_factors(shapes, seed=i)) for i in range(25)])
    for module, (b, a) in pool.average(rank).items():
        u, s, vh = torch.linalg.svd(dense_mean(pool, module), full_matrices=False)
        k = rank or len(s)
        torch.testing.assert_close(b @ a, u[:, :k] * s[:k] @ vh[:k], rtol=1e-4, atol=1e-5)
    before = copied_state(pool.backbone.model)
    with pool.folded() as backbone:
        change = backbone.model.get_submodule(FC1).weight - before[f"{FC1}.weight"]
        torch.testing.assert_close(change, dense_mean(pool, FC1), rtol=1e-4, atol=1e-5)
    assert same_weights(pool.backbone.model, before)


def test_a_sum_holds_no_more_than_the_change_itself():
    total, expected = ChangeSum(), torch.zeros(64, 32)
    for i in range(40):
        factors = random_factors({FC1: (64, 3, 32)}, seed=i)
        total.add(planted_adapter(f"a{i}", factors))
        expected += factors[FC1][0] @ factors[FC1][1]
        assert sum(b.shape[1] for b, _ in total._factors[FC1]) <= 32
    torch.testing.assert_close(total.delta(FC1), expected, rtol=1e-4, atol=1e-5)


def test_a_randomised_pool_of_files_is_drawn_again_the_same(stored):
    control = stored.randomized(3)
    drawn = [adapter.factors for adapter in control]
    assert [info.name for info in control.infos] == [info.name for info in stored.infos]
    for i in (2, 0, 3):
        assert all(torch.equal(control[i].factors[m][0], b) for m, (b, _) in drawn[i].items())
    held = AdapterPool(stored.backbone, list(stored)).randomized(3)  # the same from memory
    assert all(torch.equal(held[3].factors[m][1], a) for m, (_, a) in drawn[3].items())
