"""Distillation on the tiny pool: where it starts, that it learns, and that a killed run goes on as if nothing was."""

import dataclasses
import json
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers_tiny import copied_state, random_pixels, same_weights

from lora_recycle.distillation import preparation
from lora_recycle.distillation import teachers as teachers_module
from lora_recycle.distillation import trainer as trainer_module
from lora_recycle.distillation.batches import Batch, Prefetcher
from lora_recycle.distillation.checkpoints import OUTPUT
from lora_recycle.distillation.config import DistillationConfig
from lora_recycle.distillation.episodes import SurrogateEpisode
from lora_recycle.distillation.losses import episode_loss
from lora_recycle.distillation.schedule import learning_rate
from lora_recycle.distillation.surrogate_images import match_shards
from lora_recycle.distillation.teachers import choose_teachers, teach
from lora_recycle.distillation.trainer import MetaLoRATrainer
from lora_recycle.errors import ConfigError, DataError
from lora_recycle.fewshot.relations import principal_directions
from lora_recycle.pool.pool import AdapterPool
from lora_recycle.runtime.outputs import claim_output


def recipe(**changes):
    small = {"steps": 6, "rank": 4, "relational_batch": 16, "ways": 3, "queries": 3, "episodes": 2}
    return DistillationConfig(**{**small, **changes})


ALL_LOSSES = {"kl_weight": 1.0, "interpolation_weight": 1.0}


def train(pool, surrogate, config, folder=None):
    trainer = MetaLoRATrainer(pool, surrogate, config)
    return trainer.train(folder, progress=False), trainer


def checkpoints(folder):
    return {path.name: path.read_bytes() for path in folder.glob("checkpoint-*")}


def weights(student):
    return [p.detach().clone() for p in student.trainable()]


@torch.no_grad()
def pixel_values(pool):
    return pool.backbone.normalize(random_pixels(4))


@torch.no_grad()
@pytest.mark.parametrize(("members", "rank"), [([0, 1], 8), ([0], 16), ([0, 1, 2, 3], 32)])
def test_the_start_is_the_average_where_the_rank_suffices(tiny_pool, members, rank):
    pool = tiny_pool.subset(members)
    student, _ = train(pool, None, recipe(steps=0, rank=rank, init="average"))
    x = pixel_values(pool)
    with pool.folded() as backbone:
        expected = backbone.features(x)
    torch.testing.assert_close(student(x), expected, rtol=1e-3, atol=1e-4)
    assert (expected - pool.backbone.features(x)).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("init", ["average", "undiluted", "restored", "group-sum"])
def test_a_smaller_rank_starts_at_the_cut_average_whatever_its_scale(tiny_pool, init, monkeypatch):
    monkeypatch.setattr(tiny_pool, "groups", lambda: [[0, 2, 3], [1]])
    scales = {"average": (1 / 4, 1 / 4), "undiluted": (1 / 3, 1 / 3), "restored": (1 / 3, 1 / 4)}
    own, other = (scales | {"group-sum": (1 / 3, 1)})[init]
    student, _ = train(tiny_pool, None, recipe(steps=0, rank=2, init=init))
    for name in tiny_pool.average(2):
        whole = torch.zeros(())
        for i, adapter in enumerate(tiny_pool):
            b, a = adapter.factors.get(name, (torch.zeros(1, 1), torch.zeros(1, 1)))
            whole = whole + (other if i == 1 else own) * b @ a
        u, s, vh = torch.linalg.svd(whole, full_matrices=False)
        module = student.backbone.model.get_submodule(name)
        cut = (u[:, :2] * s[:2]) @ vh[:2]
        torch.testing.assert_close(module.get_delta_weight("default"), cut, rtol=1e-3, atol=1e-5)
    if init != "average":
        return
    norms = [sum((b @ a).square().sum() for b, a in tiny_pool.average(rank).values()) for rank in (2, 5, None)]
    assert student.average_share(2) == pytest.approx(float(norms[0] / norms[2]), rel=1e-4)
    assert student.average_share(5) == pytest.approx(float(norms[1] / norms[2]), rel=1e-4)
    assert student.average_share(2) < student.average_share(5) < student.average_share(10**6) == 1.0


def test_ranks_that_the_average_leaves_free_can_learn(tiny_pool, tiny_surrogate):
    pool = tiny_pool.subset([1])  # rank 4 on q and v only
    student, _ = train(pool, tiny_surrogate, recipe(rank=8, steps=2, validation_fraction=0.0))
    module = student.backbone.model.get_submodule("layers.1.attention.q_proj")
    assert (module.lora_B["default"].weight[:, 4:].abs().sum(0) > 0).all()
    untouched = student.backbone.model.get_submodule("layers.0.mlp.fc1")
    assert untouched.lora_B["default"].weight.abs().sum() > 0  # no adapter changed it, the student may


@torch.no_grad()
def test_zero_starts_at_the_frozen_backbone(tiny_pool):
    student, _ = train(tiny_pool, None, recipe(steps=0, init="zero"))
    assert student.average_share(1) == 1.0
    x = pixel_values(tiny_pool)
    torch.testing.assert_close(student(x), tiny_pool.backbone.features(x), rtol=1e-5, atol=1e-6)
    assert student.peft_model.peft_config["default"].base_model_name_or_path == tiny_pool.backbone.name


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("relational", {"groups": "one", "relational_batch": 96}),
        ("kl", {"relational_weight": 0.0, "kl_weight": 1.0}),
        ("interpolation", {"relational_weight": 0.0, "interpolation_weight": 1.0, "metric": "euclidean"}),
    ],
)
def test_each_loss_falls(tiny_pool, tiny_surrogate, name, settings):
    student, trainer = train(tiny_pool, tiny_surrogate, recipe(init="zero", steps=40, lr=1e-2, episodes=4, **settings))
    assert list(trainer.history) == [name]
    values = torch.tensor(trainer.history[name])
    assert len(values) == 40 and values[-8:].mean() < 0.8 * values[:8].mean()
    assert sum(p.numel() for p in student.trainable()) < sum(p.numel() for p in student.parameters()) / 2


def test_same_seed_same_weights(tiny_pool, tiny_surrogate):
    one, same, other = (
        weights(train(tiny_pool, tiny_surrogate, recipe(seed=seed, **ALL_LOSSES))[0]) for seed in (0, 0, 1)
    )
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_teachers_are_left_as_they_were(tiny_pool, tiny_surrogate):
    before = copied_state(tiny_pool.backbone)
    train(tiny_pool, tiny_surrogate, recipe(**ALL_LOSSES))
    assert same_weights(tiny_pool.backbone, before)
    assert not any(hasattr(m, "lora_A") for m in tiny_pool.backbone.modules())


@pytest.mark.parametrize("killed_at", [3, 4, 5])
def test_a_killed_run_goes_on_as_if_nothing_was(tiny_pool, tiny_surrogate, tmp_path, monkeypatch, killing, killed_at):
    config = recipe(save_steps=2, **ALL_LOSSES)
    undisturbed, whole = train(tiny_pool, tiny_surrogate, config, tmp_path / "whole")

    with killing(killed_at):
        train(tiny_pool, tiny_surrogate, config, tmp_path / "killed")
    steps = []
    monkeypatch.setattr(trainer_module, "learning_rate", lambda c, s: steps.append(s) or learning_rate(c, s))
    resumed, trainer = train(tiny_pool, tiny_surrogate, config, tmp_path / "killed")
    assert steps == list(range(killed_at // 2 * 2, 6))
    assert all(torch.equal(a, b) for a, b in zip(weights(undisturbed), weights(resumed), strict=True))
    assert trainer.history == whole.history
    assert json.loads((tmp_path / "killed" / "training_log.json").read_text()) == whole.history


def test_a_finished_run_is_not_run_again(tiny_pool, tiny_surrogate, tmp_path):
    first, _ = train(tiny_pool, tiny_surrogate, recipe(), tmp_path)
    again, trainer = train(tiny_pool, tiny_surrogate, recipe(), tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(weights(first), weights(again), strict=True))
    assert len(trainer.history["relational"]) == 6


def test_a_checkpoint_of_another_recipe_or_pool_is_refused(tiny_pool, tiny_surrogate, tmp_path):
    train(tiny_pool, tiny_surrogate, recipe(), tmp_path)
    before = checkpoints(tmp_path)
    for pool, config, told in (
        (tiny_pool, recipe(lr=0.5), "lr: 0.0005 there, 0.5 here"),
        (tiny_pool.subset([0, 1]), recipe(), "the adapters, their surrogate data or the precision differ"),
    ):
        with pytest.raises(ConfigError, match=rf"of another recipe, pool or surrogate data \({told}\).*--no-resume"):
            train(pool, tiny_surrogate, config, tmp_path)
    assert checkpoints(tmp_path) == before and len(before) == 1
    trainer = MetaLoRATrainer(tiny_pool, tiny_surrogate, recipe(lr=0.5))
    trainer.train(tmp_path, progress=False, resume=False)
    assert checkpoints(tmp_path).keys() == before.keys() and checkpoints(tmp_path) != before


def test_where_all_checkpoints_are_damaged_none_is_taken(tiny_pool, tiny_surrogate, tmp_path):
    claim_output(tmp_path, OUTPUT)
    (tmp_path / "checkpoint-00000002.safetensors").write_bytes(b"\x10\x00")
    (tmp_path / "training_log.json").write_text("{}")
    with pytest.raises(DataError, match="the checkpoint is damaged .*, and no other is left. .*--no-resume"):
        train(tiny_pool, tiny_surrogate, recipe(), tmp_path)


def test_only_kept_tokens_are_forwarded(tiny_pool, tiny_surrogate):
    seen = {}
    for use_masks in (True, False):
        trainer = MetaLoRATrainer(tiny_pool, tiny_surrogate, recipe(steps=1, use_masks=use_masks))
        lengths = seen.setdefault(use_masks, set())
        layer = trainer.student.backbone.layers[0]
        layer.register_forward_pre_hook(lambda _, inputs, lengths=lengths: lengths.add(inputs[0].shape[1]))
        trainer.train(progress=False)
    assert seen == {True: {1 + 8}, False: {1 + 16}}


def joined(surrogate, name):
    return torch.cat([getattr(surrogate.shard(i), name) for i in range(surrogate.num_shards)])


def own_logits_by_hand(pool, surrogate, i, use_masks):
    """What adapter `i` says of its own images: of their kept patches, or, as stored, of all of them."""
    shard = surrogate.shard(i)
    if not use_masks:
        return shard.teacher_logits
    with pool.folded(i) as backbone:
        hidden, _ = backbone(backbone.normalize(shard.pixels), shard.kept_tokens.long())
        return pool[i].logits(backbone, hidden)


@torch.no_grad()
@pytest.mark.parametrize("use_masks", [True, False])
def test_a_batch_holds_each_image_once_with_its_own_tokens_and_teachers(tiny_pool, tiny_surrogate, use_masks):
    trainer = MetaLoRATrainer(tiny_pool, tiny_surrogate, recipe(groups="one", use_masks=use_masks, **ALL_LOSSES))
    trainer.prepare(progress=False)
    batch, generator = trainer.make_batch(3), torch.Generator().manual_seed(3)
    groups = trainer.make_batch.groups
    index = [group.images[torch.randperm(len(group.images), generator=generator)[:16]] for group in groups]
    unique = torch.cat([*index, *(p.flatten() for e in batch.episodes for p in (e.support, e.query))]).unique()
    assert len(batch.inputs) == len(unique) < sum(map(len, batch.parts)) and len(batch.episodes) == 4
    pixels, kept = joined(tiny_surrogate, "pixels"), joined(tiny_surrogate, "kept_tokens").long()
    for rows, chosen in zip(batch.parts, index, strict=False):
        assert torch.equal(unique[rows], chosen)
    features = trainer.student(tiny_pool.backbone.normalize(batch.inputs), batch.kept)
    whole = trainer.student(tiny_pool.backbone.normalize(pixels[unique]), kept[unique] if use_masks else None)
    torch.testing.assert_close(features, whole, rtol=1e-4, atol=1e-5)
    logits = torch.cat([own_logits_by_hand(tiny_pool, tiny_surrogate, i, use_masks) for i in range(len(tiny_pool))])
    for episode, said in zip(batch.episodes, batch.logits, strict=True):
        if episode.source is not None:
            torch.testing.assert_close(said, logits[episode.query.flatten()][:, episode.classes])
    trainer.close()


@torch.no_grad()
@pytest.mark.parametrize("use_masks", [True, False])
def test_teachers_similarities_are_the_mean_over_the_teachers(tiny_pool, tiny_surrogate, tmp_path, use_masks):
    """Of what the student sees: kept patches alone where there are masks."""
    images = match_shards(tiny_pool, tiny_surrogate, use_masks)
    kept = torch.cat([tiny_surrogate.shard(i).kept_tokens.long() for i in (0, 2)]) if use_masks else None
    group = teach(tiny_pool, images, [0, 2], [0, 2], tmp_path, progress=False)
    pixels = torch.cat([tiny_surrogate.shard(i).pixels for i in (0, 2)])
    similarity = 0
    for i in (0, 2):
        with tiny_pool.folded(i) as backbone:
            unit = F.normalize(backbone.features(backbone.normalize(pixels), kept), dim=-1)
        similarity = similarity + unit @ unit.T / 2
    features = group.features.read(torch.arange(48)).float()
    torch.testing.assert_close(features @ features.T, similarity, rtol=5e-3, atol=5e-3)
    assert group.images.tolist() == [*range(24), *range(48, 72)]
    own = tiny_surrogate.shard(0)
    with tiny_pool.folded(0) as backbone:
        hidden, _ = backbone(backbone.normalize(own.pixels), own.kept_tokens.long() if use_masks else None)
        answers = tiny_pool[0].logits(backbone, hidden).argmax(1)
    for c in own.labels.unique().tolist():
        said = answers[own.labels == c]
        value, times = said.mode().values.item(), (said == said.mode().values).sum()
        assert group.votes.get((0, 0, c)) == (value if times * 2 > len(said) else None)
    assert not any(s == 1 for _, s, _ in group.votes)


@torch.no_grad()
def test_many_teacher_features_are_compressed(tiny_pool, tiny_surrogate, tmp_path, monkeypatch):
    """Two teachers, each asked twice: 128 columns of rank 64, so 64 directions lose nothing but the digits of a half.

    Rounding to a half changes x by at most 2**-11 |x|, and so an inner product of unit rows by at most 2 x 2**-11.
    """
    images, rows, teachers = match_shards(tiny_pool, tiny_surrogate), torch.arange(96), [0, 0, 1, 1]
    plain = teach(tiny_pool, images, [0, 1, 2, 3], teachers, tmp_path / "plain", progress=False)
    monkeypatch.setattr(teachers_module, "principal_directions", lambda f: principal_directions(f, dim=64))
    monkeypatch.setattr(teachers_module, "SAMPLE", 80)
    small = teach(tiny_pool, images, [0, 1, 2, 3], teachers, tmp_path / "small", progress=False)
    assert plain.features.shape == (96, 128) and small.features.shape == (96, 64)
    one, other = (group.features.read(rows).float() for group in (plain, small))
    assert (other @ other.T - one @ one.T).abs().max() < 2**-10 + 1e-5  # images outside of the sample as well


def test_at_most_so_many_teachers_spread_over_the_group():
    assert choose_teachers([4, 2, 9], 3) == [4, 2, 9]
    assert choose_teachers(list(range(100, 110)), 4) == [100, 103, 106, 109]
    assert choose_teachers([5, 6], 1) == [5]


def test_a_bound_on_teachers_bounds_what_is_asked(tiny_pool, tiny_surrogate, tmp_path):
    trainer = MetaLoRATrainer(tiny_pool, tiny_surrogate, recipe(groups="one", max_teachers=2, validation_fraction=0.0))
    trainer.prepare(tmp_path, progress=False)
    (group,) = trainer.make_batch.groups
    assert group.teachers == [0, 3] and len(group.images) == 96 and group.features.shape == (96, 64)
    trainer.close()


def test_teachers_are_asked_once_for_a_folder(tiny_pool, tiny_surrogate, tmp_path, monkeypatch):
    first, _ = train(tiny_pool, tiny_surrogate, recipe(), tmp_path)
    next(iter(tmp_path.glob("checkpoint-*"))).unlink()
    before = {path: path.read_bytes() for path in (tmp_path / "stored").iterdir()}
    assert {path.suffix for path in before} == {".npy", ".json"}
    monkeypatch.setattr(teachers_module, "_ask", lambda *_: pytest.fail("asked again"))
    again, _ = train(tiny_pool, tiny_surrogate, recipe(), tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(weights(first), weights(again), strict=True))
    next(path for path in before if path.suffix == ".npy").write_bytes(b"\x93NUMPY damaged")
    with pytest.raises(DataError, match="damaged"):
        train(tiny_pool, tiny_surrogate, recipe(lr=0.1), tmp_path)


def test_batches_read_ahead_are_the_batches_of_their_steps():
    made, threads = [], set()

    def make(step):
        made.append(step)
        threads.add(threading.current_thread())
        return Batch(torch.full((2,), step), None, 2, [], [], [], [], [])

    prefetcher = Prefetcher(make, end=6)
    assert [prefetcher.get(step).inputs[0].item() for step in (2, 3, 4)] == [2, 3, 4]
    assert prefetcher.get(1).inputs[0] == 1  # out of order: what was read ahead is left
    prefetcher.close()
    assert made[:5] == [2, 3, 4, 5, 1] and len(threads) == 1 and threading.current_thread() not in threads


def test_an_error_while_reading_ahead_reaches_the_caller():
    prefetcher = Prefetcher(lambda step: 1 / (3 - step), end=6)
    prefetcher.get(2)
    with pytest.raises(ZeroDivisionError):
        prefetcher.get(3)
    prefetcher.close()


def test_single_steps_are_the_steps_of_a_run(tiny_pool, tiny_surrogate):
    config = recipe(steps=3, share=1.0, validation_fraction=0.0, **ALL_LOSSES)
    whole, run = train(tiny_pool, tiny_surrogate, config)
    trainer = MetaLoRATrainer(tiny_pool, tiny_surrogate, config)
    assert trainer.host_share == 0
    trainer.prepare(progress=False)
    values = [{name: loss.item() for name, loss in trainer.step(i).items()} for i in range(3)]
    trainer.close()
    assert {name: [v[name] for v in values] for name in values[0]} == run.history == trainer.history
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(trainer.student), strict=True))
    assert 0 < trainer.host_share < 1


@pytest.mark.parametrize("use_masks", [True, False])
def test_tokens_kept_on_disk_train_as_tokens_computed_anew(
    tiny_pool, tiny_surrogate, tmp_path, use_masks, monkeypatch
):
    config = recipe(first_layer=1, use_masks=use_masks, eval_steps=3, groups="one", **ALL_LOSSES)
    _, stored = train(tiny_pool, tiny_surrogate, config, tmp_path)
    (path,) = (tmp_path / "stored").glob("tokens-*.npy")
    assert np.load(path).shape == (96, 9 if use_masks else 17, 32)
    monkeypatch.setattr(preparation, "tokens_entering", lambda *_: None)
    _, computed = train(tiny_pool, tiny_surrogate, config)
    for name, values in computed.history.items():
        assert stored.history[name] == pytest.approx(values, rel=5e-3)
    assert stored.selection.steps == [0, 3, 6]
    assert stored.selection.figures == pytest.approx(computed.selection.figures, abs=1)  # per cent of 60 episodes
    student, _ = train(tiny_pool, tiny_surrogate, dataclasses.replace(config, validation_fraction=0.0))
    start, _ = train(tiny_pool, None, recipe(steps=0))
    before, after = (dict(s.backbone.layers.named_parameters()) for s in (start, student))
    changed = {name.split(".")[0] for name in after if not torch.equal(before[name], after[name])}
    assert changed == {"1"} and len(student.trainable()) == len(start.trainable()) // 2


def test_a_first_layer_that_is_not_there(tiny_pool):
    with pytest.raises(ConfigError, match=r"first_layer must be in \[0, 2\), got 2"):
        MetaLoRATrainer(tiny_pool, None, recipe(steps=0, first_layer=2))


def test_surrogates_of_another_pool_are_refused(tiny_pool, tiny_surrogate):
    info = dataclasses.replace(tiny_pool[0].info, sha256="other")
    stranger = dataclasses.replace(tiny_pool[0], info=info)
    with pytest.raises(DataError, match="holds no images of the adapter adapter-0"):
        train(AdapterPool(tiny_pool.backbone, [stranger]), tiny_surrogate, recipe())


def test_training_needs_data(tiny_pool):
    with pytest.raises(ConfigError, match="needs surrogate data"):
        MetaLoRATrainer(tiny_pool, None, recipe())


def test_episodes_wider_than_the_data(tiny_pool, tiny_surrogate):
    with pytest.raises(DataError, match="7 different classes of 2 images or more, fewer than the 9"):
        train(tiny_pool, tiny_surrogate, recipe(ways=9, interpolation_weight=1.0))


def test_a_loss_that_is_not_finite_stops(tiny_pool, tiny_surrogate):
    with pytest.raises(DataError, match=r"The loss is nan at step \d: lower `lr` \(now 1e\+30\)"):
        train(tiny_pool, tiny_surrogate, recipe(lr=1e30))


def test_episode_losses_by_hand(tiny_surrogate):
    config = recipe(temperature=0.5)
    support, query = torch.eye(3), torch.eye(3)[[0, 0, 1, 2, 2, 2]]
    scores = (query @ support.T / 0.5).log_softmax(1)
    rows = torch.tensor([[24, 30], [25, 31], [26, 32]])  # the second adapter's images 0, 6, 1, 7, 2, 8
    episode = SurrogateEpisode(torch.zeros(3, 1, dtype=torch.int64), rows, 1, torch.tensor([2, 0, 3]))
    teacher = tiny_surrogate.shard(1).teacher_logits[[0, 6, 1, 7, 2, 8]][:, [2, 0, 3]]
    said = teacher.log_softmax(1)
    expected = (said.exp() * (said - scores)).sum() / 6
    torch.testing.assert_close(episode_loss(config, episode, support, query, teacher), expected)
    mixed = SurrogateEpisode(torch.zeros(3, 1, dtype=torch.int64), rows)
    expected = -scores[torch.arange(6), torch.tensor([0, 0, 1, 1, 2, 2])].mean()
    torch.testing.assert_close(episode_loss(config, mixed, support, query, None), expected)


def test_the_student_adapts_its_targets_alone(tiny_pool, tiny_surrogate):
    config = recipe(targets="q_proj, v_proj", share=0.5, init="average", rank=8)
    trainer = MetaLoRATrainer(tiny_pool, tiny_surrogate, config)
    names = {name.rpartition(".")[2] for name in trainer.student._layers}
    assert names == {"q_proj", "v_proj"} and len(trainer.student._layers) == 2 * 2
    average = dict(tiny_pool.whole_averages())
    for name, (b, a) in trainer.student._init.items():
        whole_b, whole_a = average[name]
        torch.testing.assert_close(b @ a, whole_b[:, :8] @ whole_a[:8], rtol=1e-4, atol=1e-5)
    assert trainer.student.average_share(64) == pytest.approx(1.0)
    trainer.train(progress=False)
    model = trainer.to_model()
    assert set(model.peft_model.peft_config["default"].target_modules) == {*trainer.student._layers}
    with pytest.raises(ConfigError, match=r"targets: 'query' is no linear layer of .* \(fc1, fc2, k_proj, .*v_proj\)"):
        MetaLoRATrainer(tiny_pool, tiny_surrogate, recipe(targets="query"))
