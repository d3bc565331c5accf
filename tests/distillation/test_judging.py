"""Judging by held-back images: nobody learns from them, and the best that was judged is what training gives back."""

import json

import pytest
import torch
from helpers_tiny import ListedShard

from lora_recycle.distillation import trainer as trainer_module
from lora_recycle.distillation.callbacks import TrainerCallback
from lora_recycle.distillation.config import DistillationConfig
from lora_recycle.distillation.images import SurrogateImages
from lora_recycle.distillation.judging import FEWEST, MOST, Judge, Judgements, hold_back
from lora_recycle.distillation.schedule import learning_rate
from lora_recycle.distillation.teachers import TeacherGroup
from lora_recycle.distillation.trainer import MetaLoraTrainer
from lora_recycle.errors import ConfigError, DataError
from lora_recycle.inversion.config import InversionConfig
from lora_recycle.inversion.inverter import LoraInverter
from lora_recycle.modeling.saving import save_meta_lora, wrap_student
from lora_recycle.pages.report import write_training_report
from lora_recycle.relations import relational_divergence_to


def recipe(**changes):
    small = {"steps": 12, "rank": 4, "relational_batch": 16, "judge_every": 2, "ways": 3, "queries": 3, "episodes": 2}
    return DistillationConfig(**{**small, **changes})


ALL_LOSSES = {"kl_weight": 1.0, "interpolation_weight": 1.0}
#: Its best judgement is neither the first nor the last on the tiny pool.
BEST_WITHIN = {"init": "zero", "lr": 3e-2, "groups": "one"}
#: Each step makes the student worse.
RUINOUS = {"lr": 1.0, "spike_factor": 0.0}


def train(pool, surrogate, config, folder=None, callbacks=()):
    torch.manual_seed(0)  # checkpoints hold the generator's state
    trainer = MetaLoraTrainer(pool, surrogate, config, callbacks)
    trainer.train(folder, progress=False)
    return trainer


def weights(trainer):
    return [p.detach().clone() for p in trainer.student.trainable()]


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def listed(*labels):
    """Images of adapters of these labels, all in one group."""
    images = SurrogateImages([ListedShard({}, torch.tensor(found)) for found in labels], [])
    everything = torch.arange(len(images))
    return images, TeacherGroup([0], everything, None, {}, everything)


def test_a_share_of_each_class_is_held_back():
    labels = [[0] * 20 + [1] * 3 + [2] * 2, [0] * 10 + [1]]
    images, group = listed(*labels)
    (part,), held = hold_back(images, [group], 0.2, seed=0)
    counts = {
        (s, c): int(held[images.of_shard(s)][torch.tensor(found) == c].sum())
        for s, found in enumerate(labels)
        for c in set(found)
    }
    assert counts == {(0, 0): 4, (0, 1): 1, (0, 2): 0, (1, 0): 2, (1, 1): 0}
    assert torch.equal(part.images, held.nonzero().flatten()) and torch.equal(part.rows, part.images)
    assert not torch.equal(hold_back(images, [group], 0.2, seed=1)[1], held)
    assert hold_back(images, [group], 0.0, seed=0)[0] == []


def test_few_groups_of_many_images_give_a_bounded_number_spread_evenly():
    images, group = listed(*[[0] * 600 for _ in range(10)])
    (part,), held = hold_back(images, [group], 0.5, seed=0)
    assert len(part.images) == held.sum() == MOST
    each = (part.images // 600).bincount()
    assert each.min() >= MOST // 10 and each.max() <= MOST // 10 + 2
    halves = [group.only(group.images < 3000), group.only(group.images >= 3000)]
    assert [len(part.images) for part in hold_back(images, halves, 0.5, seed=0)[0]] == [MOST // 2] * 2


def test_a_group_of_too_few_is_learnt_as_a_whole():
    images, group = listed([0, 0, 0, 1, 1, 1, 2, 2, 2], [3] * 40)
    few, many = group.only(group.images < 9), group.only(group.images >= 9)
    parts, held = hold_back(images, [few, many], 0.1, seed=0)
    assert [len(part.images) for part in parts] == [FEWEST] and not held[:9].any()


@pytest.mark.parametrize("settings", [{}, ALL_LOSSES, {"relational_weight": 0.0, "kl_weight": 1.0}])
def test_no_step_trains_on_a_held_back_image(tiny_pool, tiny_surrogate, settings, monkeypatch):
    trainer = MetaLoraTrainer(tiny_pool, tiny_surrogate, recipe(steps=60, **settings))
    trainer.prepare(progress=False)
    seen, read = [], trainer.make_batch.own_inputs
    monkeypatch.setattr(trainer.make_batch, "own_inputs", lambda index: seen.append(index) or read(index))
    for number in range(60):
        trainer.make_batch(number)
    learnt = set(torch.cat(seen).tolist())
    seen.clear()
    trainer._judge(0)
    judged = torch.cat(seen).tolist()
    trainer.close()
    assert len(judged) == len(set(judged)) == trainer.judged.images == 16  # one of each of 4 x 4 classes
    assert not learnt & set(judged) and len(learnt) == 96 - 16


@torch.no_grad()
@pytest.mark.parametrize("use_masks", [True, False])
def test_the_figure_is_the_disagreement_with_the_teachers_by_group(tiny_pool, tiny_surrogate, use_masks, monkeypatch):
    monkeypatch.setattr(tiny_pool, "groups", lambda: [[0, 2], [1, 3]])
    trainer = MetaLoraTrainer(tiny_pool, tiny_surrogate, recipe(use_masks=use_masks, similarity_scale=7.0))
    trainer.prepare(progress=False)
    shards = [tiny_surrogate.shard(i) for i in range(4)]
    pixels = torch.cat([shard.pixels for shard in shards])
    kept = torch.cat([shard.kept_tokens.long() for shard in shards])
    learnt = torch.cat([group.images for group in trainer.make_batch.groups])
    held = torch.ones(len(pixels), dtype=torch.bool).index_fill_(0, learnt, False)
    expected = []
    for members in ([0, 2], [1, 3]):
        rows = torch.cat([torch.arange(24) + 24 * i for i in members])
        rows = rows[held[rows]]
        shown = tiny_pool.backbone.normalize(pixels[rows]), kept[rows] if use_masks else None
        similarity = 0
        for i in members:
            with tiny_pool.folded(i) as backbone:
                unit = torch.nn.functional.normalize(backbone.features(*shown), dim=-1)
            similarity = similarity + unit @ unit.T / 2
        expected.append(relational_divergence_to(trainer.student(*shown), similarity, 7.0))
    trainer._judge(0)
    trainer.close()
    assert trainer.judged.figures == [pytest.approx(sum(expected).item() / 2, rel=2e-2)]


def test_the_best_of_several_judgements_is_given_back(tiny_pool, tiny_surrogate):
    class Copies(TrainerCallback):
        def __init__(self):
            self.seen, self.logged = {}, []

        def on_log(self, trainer, step, values):
            self.logged.append(step)

        def on_judge(self, trainer, step, figure):
            assert self.logged == list(range(step))
            self.seen[step] = figure, weights(trainer)

    copies = Copies()
    trainer = train(tiny_pool, tiny_surrogate, recipe(**BEST_WITHIN), callbacks=[copies])
    figures = {step: figure for step, (figure, _) in copies.seen.items()}
    best = min(figures, key=figures.get)
    assert list(figures) == trainer.judged.steps == list(range(0, 13, 2)) and 0 < best < 12
    assert trainer.judged.best_step == best and list(figures.values()) == trainer.judged.figures
    assert equal(weights(trainer), copies.seen[best][1]) and not equal(weights(trainer), copies.seen[12][1])
    assert f"Step {best} of 12 is kept" in trainer.judged.verdict()


def test_where_no_step_is_better_the_start_is_given_back_bit_for_bit(tiny_pool, tiny_surrogate, tmp_path, caplog):
    trainer = train(tiny_pool, tiny_surrogate, recipe(**RUINOUS), tmp_path / "work")
    start = train(tiny_pool, None, recipe(steps=0))
    assert len(trainer.history["relational"]) == 12 and trainer.judged.figures[-1] > 2 * trainer.judged.figures[0]
    assert equal(weights(trainer), weights(start))
    assert "The start is kept: in 12 steps the student came no closer to the teachers on 16 surr" in caplog.text
    for name, made in (("trained", trainer), ("start", start)):
        save_meta_lora(wrap_student(made), tmp_path / name)
    bytes_of = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("trained", "start")]
    assert bytes_of[0] == bytes_of[1]
    settings = json.loads((tmp_path / "trained" / "meta_lora_config.json").read_text())
    assert settings["judged"] == trainer.judged.to_dict() and settings["judged"]["best_step"] == 0
    assert "judged" in (tmp_path / "start" / "meta_lora_config.json").read_text() and start.judged.to_dict() is None
    card = (tmp_path / "trained" / "README.md").read_text()
    assert "and stayed there: 12 steps on surrogate images" in card and "made, but not learned from" in card
    page = write_training_report(tmp_path / "report.html", trainer, settings, "x").read_text()
    assert "on 16 images that were held back: " in page and "; the circle, step 0, is kept" in page


def test_the_command_says_what_is_kept(tiny_pool_path, tiny_surrogate, tmp_path, capsys):
    from lora_recycle.commands.main import main

    settings = ["--steps", "4", "--rank", "4", "--relational-batch", "16", "--judge-every", "2", "--groups", "one"]
    command = ["distill", str(tiny_pool_path), "--surrogate", str(tiny_surrogate.folder), *settings, "--output"]
    assert main([*command, str(tmp_path / "a"), "--init", "zero", "--lr", "0.03"]) == 0
    captured = capsys.readouterr()
    assert "Step 2 of 4 is kept: it is closest to the teachers on 16 surrogate images" in captured.err
    assert "is kept" not in captured.out and "judged=" in captured.err  # the progress bar


def test_patience_ends_a_training_that_gets_no_better(tiny_pool, tiny_surrogate, tmp_path):
    config = recipe(**RUINOUS, patience=2, checkpoint_every=100)
    trainer = train(tiny_pool, tiny_surrogate, config, tmp_path)
    assert trainer.judged.steps == [0, 2, 4] and len(trainer.history["relational"]) == 4
    again = train(tiny_pool, tiny_surrogate, config, tmp_path)
    assert again.judged.to_dict() == trainer.judged.to_dict() and len(again.history["relational"]) == 4
    assert equal(weights(again), weights(trainer))
    patient = train(tiny_pool, tiny_surrogate, recipe(**BEST_WITHIN, patience=6))
    assert patient.judged.steps[-1] == 12  # the best is the second of seven


@pytest.mark.parametrize("killed_at", [1, 3, 9])
def test_a_killed_run_keeps_the_best_of_before(tiny_pool, tiny_surrogate, tmp_path, monkeypatch, killed_at):
    """Killed before the first best, right after the best, and long after it."""
    config = recipe(**BEST_WITHIN, checkpoint_every=1)
    whole = train(tiny_pool, tiny_surrogate, config, tmp_path / "whole")
    assert whole.judged.best_step == 2

    def kill(config, step):
        if step == killed_at:
            raise KeyboardInterrupt
        return learning_rate(config, step)

    with monkeypatch.context() as patched:
        patched.setattr(trainer_module, "learning_rate", kill)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_pool, tiny_surrogate, config, tmp_path / "killed")
    resumed = train(tiny_pool, tiny_surrogate, config, tmp_path / "killed")
    assert resumed.judged.to_dict() == whole.judged.to_dict() and equal(weights(resumed), weights(whole))
    files = [{p.name: p.read_bytes() for p in (tmp_path / name).glob("*.*")} for name in ("whole", "killed")]
    assert files[0] == files[1] and "checkpoint-00000012.safetensors" in files[0]
    finished = train(tiny_pool, tiny_surrogate, config, tmp_path / "whole")  # only loads
    assert equal(weights(finished), weights(whole))


def test_a_training_that_a_callback_ends_is_judged_at_its_end(tiny_pool, tiny_surrogate, tmp_path):
    class Stop(TrainerCallback):
        def on_log(self, trainer, step, values):
            trainer.should_stop = True

    config = recipe(judge_every=100, steps=30)
    stopped = train(tiny_pool, tiny_surrogate, config, tmp_path, [Stop()])
    assert stopped.judged.steps == [0, 10]
    resumed, whole = (train(tiny_pool, tiny_surrogate, config, folder) for folder in (tmp_path, None))
    assert resumed.judged.to_dict() == whole.judged.to_dict() and whole.judged.steps == [0, 30]


def test_without_judging_the_last_step_is_kept(tiny_pool, tiny_surrogate, tmp_path, caplog):
    trainer = train(tiny_pool, tiny_surrogate, recipe(**RUINOUS, held_out=0.0))
    assert trainer.judged.to_dict() is None and not caplog.text
    assert sum(len(group.images) for group in trainer.make_batch.groups) == 96
    assert not equal(weights(trainer), weights(train(tiny_pool, None, recipe(steps=0))))


def test_surrogates_too_few_to_judge_on_are_told(tiny_pool, tmp_path, caplog):
    pool = tiny_pool.subset([0])
    surrogate = LoraInverter(pool, InversionConfig(images_per_class=2, iterations=1)).run(tmp_path, progress=False)
    trainer = train(pool, surrogate, recipe(steps=2))
    assert trainer.judged.steps == [] and "Nothing was judged, and the last step is kept: judging takes" in caplog.text
    with pytest.raises(DataError, match=r"2 images or more, .* \(Images that `held_out` keeps back do not count.\)"):
        train(pool, surrogate, recipe(steps=2, kl_weight=1.0, ways=5))


def test_of_equal_figures_the_first_is_kept():
    judged, parameter = Judgements(), torch.nn.Parameter(torch.zeros(1))
    for step, figure in enumerate([2.0, 1.0, 1.0, float("nan")]):
        parameter.data.fill_(step)
        judged.add(step, figure, [parameter])
    assert judged.best_step == 1 and judged.in_vain == 2 and judged.weights[0].item() == 1


def test_a_judge_says_the_same_of_the_same_weights(tiny_pool, tiny_surrogate, monkeypatch):
    found = []
    call = Judge.__call__

    def twice(judge, embed):
        found.append((call(judge, embed), call(judge, embed)))
        return found[-1][0]

    monkeypatch.setattr(Judge, "__call__", twice)
    train(tiny_pool, tiny_surrogate, recipe(steps=4))
    assert len(found) == 3 and all(one == other for one, other in found)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"held_out": 0.6}, r"held_out must be in \[0, 0.5\], got 0.6"),
        ({"judge_every": 0}, "judge_every must be at least 1, got 0"),
        ({"patience": -1}, "patience must not be negative, got -1"),
        ({"patience": 2, "held_out": 0.0}, "patience needs judgements: set held_out above 0"),
    ],
)
def test_settings_out_of_range(changes, told):
    with pytest.raises(ConfigError, match=told):
        recipe(**changes)
