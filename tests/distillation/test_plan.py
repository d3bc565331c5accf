"""The plan of a distillation: what the training does, counted on the training itself, and nothing written."""

import pytest
import torch

from lora_recycle import DistillationConfig, MetaLoRATrainer, plan_distillation
from lora_recycle.distillation import held_out, teachers
from lora_recycle.runtime import plans


def ticking(monkeypatch, each=1.0):
    """A clock that only steps move, by a second each."""
    now = [0.0]
    monkeypatch.setattr(plans, "clock", lambda: now[0])
    step = MetaLoRATrainer.step

    def slow(self, number):
        now[0] += each
        return step(self, number)

    monkeypatch.setattr(MetaLoRATrainer, "step", slow)
    return now


def config(**changes):
    return DistillationConfig(**{"steps": 6, "eval_steps": 4, "rank": 4, "relational_batch": 8, **changes})


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def by_name(plan):
    return {stage.name: stage for stage in plan.stages}


def test_steps_are_timed_and_nothing_is_written(tiny_pool, tiny_surrogate, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = files(tiny_surrogate.folder)
    ticking(monkeypatch)
    plan = plan_distillation(tiny_pool, tiny_surrogate, config(validation_fraction=0.0))
    assert by_name(plan)["learn"].seconds == 6 and plan.seconds == 6
    assert not list(tmp_path.iterdir()) and files(tiny_surrogate.folder) == before
    assert plan.memory > 0 and plan.processes == 1


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"validation_fraction": 0.5, "max_teachers": 2},
        {"relational_weight": 0.0, "kl_weight": 1.0, "ways": 3, "queries": 1, "episodes": 2},
        {"first_layer": 1, "gradient_accumulation_steps": 2, "use_masks": False},
        {"init": "average", "share": 1.0},
    ],
)
def test_it_counts_what_the_training_does(changes, tiny_pool, tiny_surrogate, monkeypatch, tmp_path):
    """Views of teachers, images of validations, images of a step: as the training itself forwards them."""
    recipe, seen = config(**changes), {"views": 0, "validated": 0}
    plan = by_name(plan_distillation(tiny_pool, tiny_surrogate, recipe))
    views, evaluate = teachers._views, held_out.HeldOutEpisodes.__call__

    def counted_views(pool, images, rows, *rest):
        seen["views"] += len(rows)
        return views(pool, images, rows, *rest)

    def counted_evaluate(self, embed):
        seen["validated"] += len(self.images)
        return evaluate(self, embed)

    monkeypatch.setattr(teachers, "_views", counted_views)
    monkeypatch.setattr(held_out.HeldOutEpisodes, "__call__", counted_evaluate)
    trainer = MetaLoRATrainer(tiny_pool, tiny_surrogate, recipe)
    trainer.train(tmp_path, progress=False)
    assert (
        plan["learn"].work == f"6 steps of {trainer.make_batch(0).count * recipe.gradient_accumulation_steps} images"
    )
    assert ("teachers" in plan) == (seen["views"] > 0)
    if seen["views"]:
        assert plan["teachers"].work.startswith(f"{seen['views']:,} views of ")
    if "validate" in plan:
        images, times = (int(word.replace(",", "")) for word in plan["validate"].work.split() if word[0].isdigit())
        assert images * times == seen["validated"]
    else:
        assert seen["validated"] == 0
    assert ("tokens" in plan) == (recipe.first_layer > 0)


def test_no_step_needs_no_images(tiny_pool):
    plan = by_name(plan_distillation(tiny_pool, None, config(steps=0)))
    assert set(plan) == {"start", "finish"}


def test_disk_covers_what_the_training_leaves(tiny_pool, tiny_surrogate, tmp_path):
    recipe = config(save_steps=2)
    plan = plan_distillation(tiny_pool, tiny_surrogate, recipe)
    MetaLoRATrainer(tiny_pool, tiny_surrogate, recipe).train(tmp_path, progress=False)
    left = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert left < 1.1 * plan.disk + 2**17  # headers, logs


def test_a_plan_changes_nothing_that_follows(tiny_pool, tiny_surrogate):
    def weights():
        return [p.detach().clone() for p in MetaLoRATrainer(tiny_pool, tiny_surrogate, config()).student.trainable()]

    before = weights()
    plan_distillation(tiny_pool, tiny_surrogate, config())
    assert all(map(torch.equal, before, weights()))
