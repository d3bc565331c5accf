"""Held-out adapters teach nothing; training gives back what is best on their classes."""

import json

import pytest
import torch
from helpers_tiny import ListedShard

from lora_recycle.distillation.callbacks import TrainerCallback
from lora_recycle.distillation.config import DistillationConfig
from lora_recycle.distillation.held_out import MOST_ADAPTERS, HeldOutEpisodes, hold_out
from lora_recycle.distillation.saving import save_meta_lora
from lora_recycle.distillation.selection import AVERAGE, CheckpointSelection, mix
from lora_recycle.distillation.surrogate_images import SurrogateImages
from lora_recycle.distillation.trainer import MetaLoRATrainer
from lora_recycle.errors import ConfigError
from lora_recycle.fewshot.prototypes import prototype_logits
from lora_recycle.reports.training_report import write_training_report


def recipe(**changes):
    small = {"steps": 12, "rank": 4, "relational_batch": 16, "eval_steps": 2, "ways": 3, "queries": 3, "episodes": 2}
    small |= {"groups": "one", "init": "average", "share": 1.0}
    return DistillationConfig(**{**small, **changes})


ALL_LOSSES = {"kl_weight": 1.0, "interpolation_weight": 1.0}
#: Each step changes the student.
LEARNING = {"init": "zero", "lr": 3e-2}
#: Each step makes the student worse.
RUINOUS = {"lr": 1.0, "spike_factor": 0.0}


def train(pool, surrogate, config, folder=None, callbacks=()):
    torch.manual_seed(0)  # checkpoints hold the generator's state
    trainer = MetaLoRATrainer(pool, surrogate, config, callbacks)
    trainer.train(folder, progress=False)
    return trainer


def weights(trainer):
    return [p.detach().clone() for p in trainer.student.trainable()]


@pytest.fixture
def best_within(monkeypatch):
    """Step 2 makes the smallest error, whatever the weights: which step truly does differs between processors."""
    add = CheckpointSelection.add

    def scripted(self, step, candidate, errors, parameters):
        add(self, step, candidate, torch.full_like(errors, 30.0 + abs(step - 2)), parameters)

    monkeypatch.setattr(CheckpointSelection, "add", scripted)


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def listed(adapters, labels):
    return SurrogateImages([ListedShard({}, torch.tensor(labels)) for _ in range(adapters)], [])


def test_a_share_of_each_group_of_adapters_is_held_out():
    images = listed(30, [0, 0, 1, 1])
    groups = [list(range(0, 20)), list(range(20, 24)), list(range(24, 27)), [27, 28, 29]]
    found = hold_out(groups, images, 0.2)
    assert found[-1] == 20 and [i for i in found if i < 20] == [0, 6, 13, 19]  # none of the groups of three
    assert hold_out(groups, images, 0.0) == []
    assert len(hold_out([list(range(30))], images, 0.05)) == 2  # rounded
    assert hold_out([list(range(8))], listed(8, [0, 0, 1]), 0.5) == []  # one class has one image: no episode


def test_many_adapters_give_a_bounded_number():
    images, groups = listed(200, [0, 0, 1, 1]), [list(range(100)), list(range(100, 200))]
    found = hold_out(groups, images, 0.2)
    assert len(found) == MOST_ADAPTERS and sum(i < 100 for i in found) == MOST_ADAPTERS // 2


@pytest.mark.parametrize("settings", [{}, ALL_LOSSES, {"relational_weight": 0.0, "kl_weight": 1.0}])
def test_no_step_trains_on_an_image_of_a_held_out_adapter(tiny_pool, tiny_surrogate, settings, monkeypatch):
    trainer = MetaLoRATrainer(tiny_pool, tiny_surrogate, recipe(steps=60, **settings))
    trainer.prepare(progress=False)
    seen, read = [], trainer.make_batch.own_inputs
    monkeypatch.setattr(trainer.make_batch, "own_inputs", lambda index: seen.append(index) or read(index))
    for number in range(60):
        trainer.make_batch(number)
    learnt = set(torch.cat(seen).tolist())
    seen.clear()
    trainer._evaluate(0)
    judged = torch.cat(seen).tolist()
    trainer.close()
    own = trainer.make_batch.images.of_shard(0).tolist()
    assert sorted(judged) == own and trainer.selection.adapters == [tiny_pool.infos[0].name]
    assert not learnt & set(own) and len(learnt) == 3 * 24
    assert all(0 not in group.teachers for group in trainer.make_batch.groups)


@torch.no_grad()
@pytest.mark.parametrize("use_masks", [True, False])
def test_the_figure_is_the_error_of_prototypes_on_what_it_never_met(tiny_pool, tiny_surrogate, use_masks):
    trainer = MetaLoRATrainer(tiny_pool, tiny_surrogate, recipe(use_masks=use_masks))
    trainer.prepare(progress=False)
    shard = tiny_surrogate.shard(0)
    shown = tiny_pool.backbone.normalize(shard.pixels), shard.kept_tokens.long() if use_masks else None
    features = trainer.student(*shown).float()
    (episodes,) = trainer._candidates.held_out._episodes
    order = torch.cat([(shard.labels == c).nonzero().flatten() for c in range(4)])
    wrong, asked = 0, 0
    for episode in episodes:
        support, query = order[episode.support[:, 0]], order[episode.query]
        assert shard.labels[support].unique().numel() == 4 and not set(support.tolist()) & set(query.tolist())
        answers = prototype_logits(features[query], features[support]).argmax(1)
        wrong += int((shard.labels[support][answers] != shard.labels[query]).sum())
        asked += len(query)
    trainer._evaluate(0)
    trainer.close()
    assert asked == 60 * 4 * 5 and 0 < wrong < asked
    assert trainer.selection.figures == [pytest.approx(100 * wrong / asked, abs=0.2)]


def test_the_best_of_several_evaluations_is_given_back(tiny_pool, tiny_surrogate, best_within):
    class Copies(TrainerCallback):
        def __init__(self):
            self.seen, self.logged = {}, []

        def on_log(self, trainer, step, values):
            self.logged.append(step)

        def on_evaluate(self, trainer, step, figure):
            assert self.logged == list(range(step))
            self.seen[step] = figure, weights(trainer)

    copies = Copies()
    trainer = train(tiny_pool, tiny_surrogate, recipe(**LEARNING), callbacks=[copies])
    figures = {step: figure for step, (figure, _) in copies.seen.items()}
    best = min(figures, key=figures.get)
    assert list(figures) == trainer.selection.steps == list(range(0, 13, 2)) and best == 2
    assert trainer.selection.best_step == best and list(figures.values()) == trainer.selection.figures
    assert equal(weights(trainer), copies.seen[best][1]) and not equal(weights(trainer), copies.seen[12][1])
    assert f"Step {best} of 12 is kept" in trainer.selection.verdict()


def test_where_no_step_is_better_the_start_is_given_back_bit_for_bit(tiny_pool, tiny_surrogate, tmp_path, caplog):
    trainer = train(tiny_pool, tiny_surrogate, recipe(**RUINOUS), tmp_path / "work")
    start = train(tiny_pool, None, recipe(steps=0))
    assert (
        len(trainer.history["relational"]) == 12 and trainer.selection.figures[-1] > trainer.selection.figures[0] + 5
    )
    assert equal(weights(trainer), weights(start))
    assert (
        "The start is kept: 12 steps give no significantly smaller error on the classes of 1 validation adapter"
        in caplog.text
    )
    for name, made in (("trained", trainer), ("start", start)):
        save_meta_lora(made.to_model(), tmp_path / name)
    bytes_of = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("trained", "start")]
    assert bytes_of[0] == bytes_of[1]
    settings = json.loads((tmp_path / "trained" / "meta_lora_config.json").read_text())
    assert settings["judged"] == trainer.selection.to_dict() and settings["judged"]["best_step"] == 0
    assert "judged" in (tmp_path / "start" / "meta_lora_config.json").read_text() and start.selection.to_dict() is None
    card = (tmp_path / "trained" / "README.md").read_text()
    assert (
        "and was kept as it was: 12 steps on surrogate images" in card and "made, but not used in the result" in card
    )
    page = write_training_report(tmp_path / "report.html", trainer, settings, "x").read_text()
    assert "error on the classes of 1 validation adapter" in page and "; the circle, step 0, is kept" in page


def test_the_command_says_what_is_kept(tiny_pool_path, tiny_surrogate, tmp_path, capsys, best_within):
    from lora_recycle.cli.main import main

    settings = ["--steps", "4", "--rank", "4", "--relational-batch", "16", "--eval-steps", "2", "--groups", "one"]
    command = ["distill", str(tiny_pool_path), "--surrogate", str(tiny_surrogate.folder), *settings, "--output"]
    assert main([*command, str(tmp_path / "a"), "--init", "zero", "--lr", "0.03"]) == 0
    captured = capsys.readouterr()
    assert (
        "Step 2 of 4 is kept: of the steps significantly better than the start, it has the smallest error"
        in captured.err
    )
    assert "is kept" not in captured.out and "best_step=" in captured.err  # the progress bar


def test_patience_ends_a_training_that_gets_no_better(tiny_pool, tiny_surrogate, tmp_path):
    config = recipe(**RUINOUS, patience=2, save_steps=100)
    trainer = train(tiny_pool, tiny_surrogate, config, tmp_path)
    assert trainer.selection.steps == [0, 2, 4] and len(trainer.history["relational"]) == 4
    again = train(tiny_pool, tiny_surrogate, config, tmp_path)
    assert again.selection.to_dict() == trainer.selection.to_dict() and len(again.history["relational"]) == 4
    assert equal(weights(again), weights(trainer))


def test_patience_counts_from_the_best(tiny_pool, tiny_surrogate, best_within):
    judged = [train(tiny_pool, tiny_surrogate, recipe(**LEARNING, patience=p)).selection.steps for p in (3, 6)]
    assert [steps[-1] for steps in judged] == [8, 12] and judged[0] == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("killed_at", [1, 3, 9])
def test_a_killed_run_keeps_the_best_of_before(tiny_pool, tiny_surrogate, tmp_path, killing, best_within, killed_at):
    """Killed before the first best, right after the best, and long after it."""
    config = recipe(**LEARNING, save_steps=1)
    whole = train(tiny_pool, tiny_surrogate, config, tmp_path / "whole")
    assert whole.selection.best_step == 2

    with killing(killed_at):
        train(tiny_pool, tiny_surrogate, config, tmp_path / "killed")
    resumed = train(tiny_pool, tiny_surrogate, config, tmp_path / "killed")
    assert resumed.selection.to_dict() == whole.selection.to_dict() and equal(weights(resumed), weights(whole))
    files = [{p.name: p.read_bytes() for p in (tmp_path / name).glob("*.*")} for name in ("whole", "killed")]
    assert files[0] == files[1] and "checkpoint-00000012.safetensors" in files[0]
    finished = train(tiny_pool, tiny_surrogate, config, tmp_path / "whole")  # only loads
    assert equal(weights(finished), weights(whole))


def test_a_training_that_a_callback_ends_is_judged_at_its_end(tiny_pool, tiny_surrogate, tmp_path):
    class Stop(TrainerCallback):
        def on_log(self, trainer, step, values):
            trainer.should_stop = True

    config = recipe(eval_steps=100, steps=30)
    stopped = train(tiny_pool, tiny_surrogate, config, tmp_path, [Stop()])
    assert stopped.selection.steps == [0, 10]
    resumed, whole = (train(tiny_pool, tiny_surrogate, config, folder) for folder in (tmp_path, None))
    assert resumed.selection.to_dict() == whole.selection.to_dict() and whole.selection.steps == [0, 30]


def test_without_evaluation_the_last_step_is_kept(tiny_pool, tiny_surrogate, tmp_path, caplog):
    trainer = train(tiny_pool, tiny_surrogate, recipe(**RUINOUS, validation_fraction=0.0))
    assert trainer.selection.to_dict() is None and not caplog.text
    assert sum(len(group.images) for group in trainer.make_batch.groups) == 96
    assert not equal(weights(trainer), weights(train(tiny_pool, None, recipe(steps=0))))


def test_too_few_adapters_to_evaluate_on_are_reported(tiny_pool, tiny_surrogate, caplog):
    trainer = train(tiny_pool.subset([0, 1, 2]), tiny_surrogate, recipe(steps=2))
    assert (
        trainer.selection.steps == []
        and "No validation was possible, so the last step is kept: it needs" in caplog.text
    )


def evaluated(first, groups, *errors):
    """The selection of a student whose only weight is the number of the evaluation."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    judged = CheckpointSelection([f"adapter {i}" for i in range(len(groups))], groups)
    for step, values in enumerate(errors):
        parameter.data.fill_(step)
        judged.add(step, mix(1.0) if step else first, values, [parameter])
    return judged


START = torch.tensor([40.0, 60.0, 20.0, 80.0])
NOISE = torch.tensor([-30.0, 20.0, 15.0, -10.0])  # lower, but by chance


def test_what_is_significantly_better_than_the_start_takes_its_place_and_of_equal_ones_the_first():
    chance = evaluated(mix(1.0), [0], START, START + NOISE)
    assert chance.figures[1] < chance.figures[0] and chance.best_step == 0 and chance.margins[1] > 20
    judged = evaluated(mix(1.0), [0], START, START + NOISE, START - 5, START - 5, START - 4, START * float("nan"))
    assert judged.best_step == 2 and judged.evaluations_since_best == 3 and judged.weights[0].item() == 2


def test_what_is_not_significantly_worse_than_the_average_takes_its_place():
    for noise in (NOISE, -NOISE):
        assert evaluated(AVERAGE, [0], START, START + noise).best_step == 1
    judged = evaluated(AVERAGE, [0], START, START + 1, START * float("nan"))
    assert judged.best_step == 0 and "give a significantly larger error on the classes" in judged.verdict()


def test_what_is_better_overall_and_significantly_worse_in_a_group_is_not_kept():
    start = torch.cat([START, torch.tensor([50.0, 50.0])])
    changes = ([0.0] * 6, [1.0, 1.0, -9.0, -9.0, -9.0, -9.0], [-4.0, 5.0, -6.0, -6.0, 1.0, 1.0], [-1.0] * 6)
    for first, kept in (
        (AVERAGE, 2),
        (mix(1.0), 3),
    ):  # the first group of 2 rose by half a point, but not significantly
        judged = evaluated(first, [0, 1, 1], *(start + torch.tensor(change) for change in changes))
        assert judged.figures[1] == min(judged.figures) and judged.rises[1] == 1.0
        assert judged.best_step == kept and judged.rises[2] < 0 and judged.to_dict()["rises"] == judged.rises
        only_worse = evaluated(first, [0, 1], *(start[:4] + torch.tensor(change[:4]) for change in changes[:2]))
        assert only_worse.best_step == 0
    assert "give no significantly smaller error" in only_worse.verdict()


def test_the_same_weights_make_the_same_errors(tiny_pool, tiny_surrogate, monkeypatch):
    found = []
    call = HeldOutEpisodes.__call__

    def twice(episodes, embed):
        found.append((call(episodes, embed), call(episodes, embed)))
        return found[-1][0]

    monkeypatch.setattr(HeldOutEpisodes, "__call__", twice)
    train(tiny_pool, tiny_surrogate, recipe(steps=4))
    assert len(found) == 3 and all(torch.equal(one, other) for one, other in found)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"validation_fraction": 0.6}, r"validation_fraction must be in \[0, 0.5\], got 0.6"),
        ({"eval_steps": 0}, "eval_steps must be at least 1, got 0"),
        ({"patience": -1}, "patience must not be negative, got -1"),
        (
            {"patience": 2, "validation_fraction": 0.0},
            "patience needs validation adapters: set validation_fraction above 0",
        ),
    ],
)
def test_settings_out_of_range(changes, told):
    with pytest.raises(ConfigError, match=told):
        recipe(**changes)
