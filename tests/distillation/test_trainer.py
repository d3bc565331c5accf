"""Distillation on the tiny pool: where it starts, that it learns, and that a killed run goes on as if nothing was."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from helpers_tiny import copied_state, random_pixels, same_weights

from lora_recycle.distillation import trainer as trainer_module
from lora_recycle.distillation.config import DistillationConfig
from lora_recycle.distillation.episodes import SurrogateEpisode
from lora_recycle.distillation.teachers import match_shards, teach
from lora_recycle.distillation.trainer import MetaLoraTrainer, learning_rate
from lora_recycle.errors import ConfigError, DataError
from lora_recycle.pool import AdapterPool


def recipe(**changes):
    small = {"steps": 6, "rank": 4, "relational_batch": 16, "ways": 3, "queries": 3, "episodes": 2}
    return DistillationConfig(**{**small, **changes})


ALL_LOSSES = {"kl_weight": 1.0, "interpolation_weight": 1.0}


def train(pool, surrogate, config, folder=None):
    trainer = MetaLoraTrainer(pool, surrogate, config)
    return trainer.train(folder, progress=False), trainer


def weights(student):
    return [p.detach().clone() for p in student.trainable()]


@torch.no_grad()
def pixel_values(pool):
    return pool.backbone.normalize(random_pixels(4))


@torch.no_grad()
@pytest.mark.parametrize(("members", "rank"), [([0, 1], 8), ([0], 16), ([0, 1, 2, 3], 32)])
def test_the_start_is_the_average_where_the_rank_suffices(tiny_pool, members, rank):
    pool = tiny_pool.subset(members)
    student, _ = train(pool, None, recipe(steps=0, rank=rank))
    x = pixel_values(pool)
    with pool.folded() as backbone:
        expected = backbone.features(x)
    torch.testing.assert_close(student(x), expected, rtol=1e-3, atol=1e-4)
    assert (expected - pool.backbone.features(x)).abs().max() > 1e-2


@torch.no_grad()
def test_a_smaller_rank_starts_at_the_cut_average(tiny_pool):
    student, _ = train(tiny_pool, None, recipe(steps=0, rank=2))
    for name, (b, a) in tiny_pool.average(2).items():
        module = student.backbone.model.get_submodule(name)
        torch.testing.assert_close(module.get_delta_weight("default"), b @ a, rtol=1e-3, atol=1e-5)


def test_ranks_that_the_average_leaves_free_can_learn(tiny_pool, tiny_surrogate):
    pool = tiny_pool.subset([1])  # rank 4 on q and v only
    student, _ = train(pool, tiny_surrogate, recipe(rank=8, steps=2))
    module = student.backbone.model.get_submodule("layers.1.attention.q_proj")
    assert (module.lora_B["default"].weight[:, 4:].abs().sum(0) > 0).all()
    untouched = student.backbone.model.get_submodule("layers.0.mlp.fc1")
    assert untouched.lora_B["default"].weight.abs().sum() > 0  # no adapter changed it, the student may


@torch.no_grad()
def test_zero_starts_at_the_frozen_backbone(tiny_pool):
    student, _ = train(tiny_pool, None, recipe(steps=0, init="zero"))
    x = pixel_values(tiny_pool)
    assert torch.equal(student(x), tiny_pool.backbone.features(x))
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
def test_a_killed_run_goes_on_as_if_nothing_was(tiny_pool, tiny_surrogate, tmp_path, monkeypatch, killed_at):
    config = recipe(checkpoint_every=2, **ALL_LOSSES)
    undisturbed, whole = train(tiny_pool, tiny_surrogate, config, tmp_path / "whole")

    def kill(config, step):
        if step == killed_at:
            raise KeyboardInterrupt
        return learning_rate(config, step)

    with monkeypatch.context() as patched:
        patched.setattr(trainer_module, "learning_rate", kill)
        with pytest.raises(KeyboardInterrupt):
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
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    for pool, config in ((tiny_pool, recipe(lr=0.5)), (tiny_pool.subset([0, 1]), recipe())):
        with pytest.raises(ConfigError, match="checkpoint of another recipe, pool or surrogate data"):
            train(pool, tiny_surrogate, config, tmp_path)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before


def test_a_damaged_checkpoint_is_refused(tiny_pool, tiny_surrogate, tmp_path):
    (tmp_path / "checkpoint.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(DataError, match="the checkpoint is damaged"):
        train(tiny_pool, tiny_surrogate, recipe(), tmp_path)


def test_cosine_schedule():
    config = DistillationConfig(steps=100, lr=1.0)
    values = [learning_rate(config, step) for step in range(100)]
    assert values[0] == pytest.approx(0.2) and values[4] == pytest.approx(0.996, abs=1e-3)  # 5 steps of warm-up
    assert values[50] == pytest.approx(0.5) and 0 < values[99] < 1e-3
    assert values[5:] == sorted(values[5:], reverse=True)


def test_cyclic_schedule():
    config = DistillationConfig(steps=300, lr=1e-2, schedule="cyclic")
    assert learning_rate(config, 0) == pytest.approx(1e-5)
    assert learning_rate(config, 10) == pytest.approx(1e-5 + (1e-2 - 1e-5) * 0.4)
    assert learning_rate(config, 25) == pytest.approx(1e-2)
    assert learning_rate(config, 50) == pytest.approx(1e-2 * 0.75)  # a third of the fall: cos(pi/3) = 1/2
    assert learning_rate(config, 99) < 1e-5
    assert [learning_rate(config, s) for s in range(100)] == [learning_rate(config, s) for s in range(100, 200)]


def test_only_kept_tokens_are_forwarded(tiny_pool, tiny_surrogate):
    seen = {}
    for use_masks in (True, False):
        trainer = MetaLoraTrainer(tiny_pool, tiny_surrogate, recipe(steps=1, use_masks=use_masks))
        lengths = seen.setdefault(use_masks, set())
        layer = trainer.student.backbone.layers[0]
        layer.register_forward_pre_hook(lambda _, inputs, lengths=lengths: lengths.add(inputs[0].shape[1]))
        trainer.train(progress=False)
    assert seen == {True: {1 + 8}, False: {1 + 16}}


@torch.no_grad()
def test_an_image_keeps_its_own_tokens(tiny_pool, tiny_surrogate):
    trainer = MetaLoraTrainer(tiny_pool, tiny_surrogate, recipe())
    trainer._prepare(False)
    index = torch.tensor([30, 2, 30, 71])
    pixels = torch.cat([tiny_surrogate.shard(i).pixels for i in range(4)])[index]
    kept = torch.cat([tiny_surrogate.shard(i).kept_tokens for i in range(4)])[index].long()
    expected = trainer.student(tiny_pool.backbone.normalize(pixels), kept)
    torch.testing.assert_close(trainer._features(trainer.student, index), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_teachers_similarities_are_the_mean_over_the_adapters(tiny_pool, tiny_surrogate):
    shards = match_shards(tiny_pool, tiny_surrogate)
    groups, predictions = teach(tiny_pool, shards, [[0, 2], [1]], progress=False)
    assert [g.adapters for g in groups] == [[0, 2], [1]]
    pixels = torch.cat([shards[0].pixels, shards[2].pixels])
    similarity = 0
    for i in (0, 2):
        with tiny_pool.folded(i) as backbone:
            unit = F.normalize(backbone.features(backbone.normalize(pixels)), dim=-1)
        similarity = similarity + unit @ unit.T / 2
    features = groups[0].features.float()
    torch.testing.assert_close(features @ features.T, similarity, rtol=5e-3, atol=5e-3)
    assert groups[0].images.tolist() == [*range(24), *range(48, 72)]
    assert torch.equal(predictions[0, :24].long(), shards[0].teacher_logits.argmax(1))
    assert (predictions[0, 24:48] == -1).all() and (predictions[3] == -1).all()


def test_surrogates_of_another_pool_are_refused(tiny_pool, tiny_surrogate):
    info = dataclasses.replace(tiny_pool[0].info, sha256="other")
    stranger = dataclasses.replace(tiny_pool[0], info=info)
    with pytest.raises(DataError, match="holds no images of the adapter adapter-0"):
        train(AdapterPool(tiny_pool.backbone, [stranger]), tiny_surrogate, recipe())


def test_training_needs_data(tiny_pool):
    with pytest.raises(ConfigError, match="needs surrogate data"):
        MetaLoraTrainer(tiny_pool, None, recipe())


def test_episodes_wider_than_the_data(tiny_pool, tiny_surrogate):
    with pytest.raises(DataError, match="7 different classes of 2 images or more, fewer than the 9"):
        train(tiny_pool, tiny_surrogate, recipe(ways=9, interpolation_weight=1.0))


def test_a_loss_that_is_not_finite_stops(tiny_pool, tiny_surrogate):
    with pytest.raises(DataError, match=r"The loss is nan at step \d: lower `lr` \(now 1e\+30\)"):
        train(tiny_pool, tiny_surrogate, recipe(lr=1e30))


def test_episode_losses_by_hand(tiny_pool, tiny_surrogate):
    trainer = MetaLoraTrainer(tiny_pool, tiny_surrogate, recipe(temperature=0.5))
    trainer._prepare(False)
    support, query = torch.eye(3), torch.eye(3)[[0, 0, 1, 2, 2, 2]]
    scores = (query @ support.T / 0.5).log_softmax(1)
    rows = torch.tensor([[24, 30], [25, 31], [26, 32]])  # the second adapter's images 0, 6, 1, 7, 2, 8
    episode = SurrogateEpisode(torch.zeros(3, 1, dtype=torch.int64), rows, 1, torch.tensor([2, 0, 3]))
    teacher = tiny_surrogate.shard(1).teacher_logits[[0, 6, 1, 7, 2, 8]][:, [2, 0, 3]].log_softmax(1)
    expected = (teacher.exp() * (teacher - scores)).sum() / 6
    torch.testing.assert_close(trainer._episode_loss(episode, support, query), expected)
    mixed = SurrogateEpisode(torch.zeros(3, 1, dtype=torch.int64), rows)
    expected = -scores[torch.arange(6), torch.tensor([0, 0, 1, 1, 2, 2])].mean()
    torch.testing.assert_close(trainer._episode_loss(mixed, support, query), expected)
