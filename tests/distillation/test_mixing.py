"""Learning begins at the groups' sum, and a share is kept beside the initialisation, if it is not judged worse."""

import json

import pytest
import torch

from lora_recycle.distillation.config import DistillationConfig
from lora_recycle.distillation.saving import save_meta_lora
from lora_recycle.distillation.selection import AVERAGE, INIT, CheckpointSelection, mix
from lora_recycle.distillation.trainer import MetaLoRATrainer
from lora_recycle.errors import ConfigError
from lora_recycle.hub.cards import meta_lora_card
from lora_recycle.merging import GroupSum
from lora_recycle.reports.training_report import write_training_report


PIXELS = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
GROUPS = [[0, 2, 3], [1]]
#: What is kept of the learnt by default.
KEPT = mix(0.25)


@pytest.fixture(autouse=True)
def two_groups(tiny_pool, monkeypatch):
    monkeypatch.setattr(tiny_pool, "groups", lambda *_: GROUPS)


def recipe(**changes):
    small = {"steps": 4, "rank": 32, "relational_batch": 16, "eval_steps": 2, "groups": "one", "lr": 1e-2}
    return DistillationConfig(**{**small, **changes})


def trained(pool, surrogate, folder=None, **changes):
    trainer = MetaLoRATrainer(pool, surrogate, recipe(**changes))
    trainer.train(folder, progress=False)
    return trainer


def deltas(student):
    return {name: layer.get_delta_weight("default").detach().clone() for name, layer in student._layers.items()}


def start(pool, init):
    return deltas(MetaLoRATrainer(pool, None, recipe(steps=0, init=init)).student)


def assert_equal(one, other, **tolerances):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], **{"rtol": 1e-3, "atol": 1e-5, **tolerances})


@pytest.fixture
def errors(monkeypatch):
    """The error of each evaluation, by step and candidate, whatever the weights."""
    told, add = {}, CheckpointSelection.add

    def listed(self, step, candidate, values, parameters):
        add(self, step, candidate, torch.full_like(values, told.get((step, candidate), 50.0)), parameters)

    monkeypatch.setattr(CheckpointSelection, "add", listed)
    return told


def test_it_begins_at_the_sum_of_the_groups_averages(tiny_pool, tiny_surrogate):
    student = MetaLoRATrainer(tiny_pool, tiny_surrogate, recipe()).student
    changes = GroupSum().changes(tiny_pool)
    expected = {name: changes.get(f"{name}.weight", torch.zeros_like(d)) for name, d in deltas(student).items()}
    assert_equal(deltas(student), expected)
    plain = MetaLoRATrainer(tiny_pool, tiny_surrogate, recipe(share=1.0)).student
    assert_equal(deltas(plain), start(tiny_pool, "restored"), rtol=0, atol=0)
    assert max((deltas(student)[name] - deltas(plain)[name]).abs().max() for name in expected) > 0.01


def test_a_share_of_what_was_learnt_is_kept_beside_the_initialisation(tiny_pool, tiny_surrogate):
    learnt = deltas(trained(tiny_pool, tiny_surrogate, share=0.999999, validation_fraction=0.0).student)
    init = start(tiny_pool, "restored")
    part = deltas(trained(tiny_pool, tiny_surrogate, share=0.3, validation_fraction=0.0).student)
    assert_equal(part, {name: 0.3 * learnt[name] + 0.7 * init[name] for name in init}, atol=1e-4)
    assert max((learnt[name] - init[name]).abs().max() for name in init) > 0.01


@torch.no_grad()
def test_what_is_judged_is_what_is_kept(tiny_pool, tiny_surrogate):
    with torch.enable_grad():
        student = trained(tiny_pool, tiny_surrogate, validation_fraction=0.0, share=0.5).student
    student.begin_at_group_sum(tiny_pool)
    for alpha in (0.3, 0.0, 1.0):
        with student.mixed(alpha):
            judged = student(PIXELS)
        own = [p.clone() for p in student.trainable()]
        student.mix(alpha)
        torch.testing.assert_close(student(PIXELS), judged, rtol=1e-4, atol=1e-4)
        for parameter, value in zip(student.trainable(), own, strict=True):
            parameter.copy_(value)


def test_the_first_that_is_judged_is_the_pools_average(tiny_pool, tiny_surrogate):
    judged = trained(tiny_pool, tiny_surrogate).selection
    assert judged.steps == [0, 0, 2, 4]
    assert judged.candidates == [AVERAGE, INIT, KEPT, KEPT]
    average = trained(tiny_pool, tiny_surrogate, init="average").selection
    assert average.steps == [0, 2, 4] and average.candidates[0] == INIT
    assert judged.figures[0] == pytest.approx(average.figures[0], abs=0.2)  # the same network, once folded, once worn


def after_steps_that_make_it_worse(pool, surrogate, folder):
    """The student, and what the card and the report say of it."""
    trainer = trained(pool, surrogate)
    assert trainer.selection.best_step == 0
    save_meta_lora(trainer.to_model(), folder)
    settings = json.loads((folder / "meta_lora_config.json").read_text())
    assert settings["judged"] == trainer.selection.to_dict()
    page = write_training_report(folder / "report.html", trainer, settings, "x").read_text()
    return trainer.student, " ".join((folder / "README.md").read_text().split()), page


def test_where_steps_are_worse_the_average_is_given_back(tiny_pool, tiny_surrogate, errors, tmp_path, caplog):
    errors[0, AVERAGE] = 40.0
    student, card, page = after_steps_that_make_it_worse(tiny_pool, tiny_surrogate, tmp_path)
    assert_equal(deltas(student), start(tiny_pool, "average"), rtol=0, atol=0)
    assert "The average is kept: 4 steps give a significantly larger error" in caplog.text
    assert "and was reset to the plain average: 4 steps" in card
    assert "(40.0 with the pool&#39;s average, which is kept): 50 to 50 in 4 steps<" in page


def test_or_the_start_where_that_errs_less(tiny_pool, tiny_surrogate, errors, tmp_path, caplog):
    errors.update({(0, INIT): 40.0, (2, KEPT): 60.0, (4, KEPT): 60.0})
    student, card, page = after_steps_that_make_it_worse(tiny_pool, tiny_surrogate, tmp_path)
    assert_equal(deltas(student), start(tiny_pool, "restored"), rtol=0, atol=0)
    assert "The start is kept: of the steps not significantly worse than the average" in caplog.text
    assert "and was kept as it was: 4 steps" in card
    assert "(50.0 with the pool&#39;s average): 40 to 60 in 4 steps; the circle, step 0, is kept<" in page


def test_the_best_step_is_kept_in_part(tiny_pool, tiny_surrogate, errors, tmp_path):
    errors[2, KEPT] = 40.0
    trainer = trained(tiny_pool, tiny_surrogate)
    assert trainer.selection.best_step == 2 and "Step 2 of 4 is kept" in trainer.selection.verdict()
    unjudged = MetaLoRATrainer(tiny_pool, tiny_surrogate, recipe())
    unjudged.prepare(progress=False)
    for number in range(2):
        unjudged.step(number)
    unjudged.close()
    unjudged.student.mix(KEPT.alpha)
    assert_equal(deltas(trainer.student), deltas(unjudged.student), rtol=0, atol=0)
    card = meta_lora_card("x", "y", None, 32, trainer.to_model().settings)
    assert "Its change is 25% of the distilled one plus 75% of the start" in " ".join(card.split())


@pytest.mark.parametrize("killed_at", [1, 3])
def test_a_killed_run_keeps_the_same(tiny_pool, tiny_surrogate, tmp_path, killing, errors, killed_at):
    errors[2, KEPT] = 40.0
    whole = trained(tiny_pool, tiny_surrogate, save_steps=1)

    with killing(killed_at):
        trained(tiny_pool, tiny_surrogate, tmp_path, save_steps=1)
    resumed = trained(tiny_pool, tiny_surrogate, tmp_path, save_steps=1)
    assert resumed.selection.to_dict() == whole.selection.to_dict()
    assert_equal(deltas(resumed.student), deltas(whole.student), rtol=0, atol=0)


def test_layers_that_do_not_learn_keep_the_initialisation(tiny_pool, tiny_surrogate):
    trainer = trained(tiny_pool, tiny_surrogate, first_layer=1)
    assert trainer.selection.candidates[0] == INIT  # the stored tokens are of the initialisation's first layer
    before, after = start(tiny_pool, "restored"), deltas(trainer.student)
    early = [name for name in before if "layers.0." in name]
    assert early and all(torch.equal(before[name], after[name]) for name in early)


@pytest.mark.parametrize("settings", [{"init": "zero"}, {"peft_type": "DORA"}, {"init": "pissa"}, {"share": 1.0}])
def test_others_learn_from_their_start_and_keep_it_all(tiny_pool, tiny_surrogate, settings):
    assert not recipe(**settings).mixes
    judged = trained(tiny_pool, tiny_surrogate, **{"rank": 4, **settings}).selection
    assert judged.candidates[-1] == mix(1.0)


def test_in_the_loss_each_image_counts_the_same_or_each_group(tiny_pool, tiny_surrogate, monkeypatch):
    monkeypatch.setattr(tiny_pool, "groups", lambda *_: [[0, 1, 2], [3]])
    weights = {}
    for balance in ("images", "groups"):
        trainer = MetaLoRATrainer(tiny_pool, tiny_surrogate, recipe(groups="auto", balance=balance))
        trainer.prepare(progress=False)
        weights[balance] = trainer.make_batch(0).weights
        trainer.close()
    assert weights == {"images": [0.75, 0.25], "groups": [0.5, 0.5]}


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_a_share_that_is_none(share):
    with pytest.raises(ConfigError, match=r"share must be in \(0, 1\], got"):
        recipe(share=share)
