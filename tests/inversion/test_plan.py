"""The plan of an inversion: what `run` does, counted on `run` itself, and nothing written."""

import pytest

from lora_recycle import ConfigError, InversionConfig, LoRAInverter, plan_inversion
from lora_recycle.backbones.flops import inversion_flops
from lora_recycle.inversion.batch import InversionBatch
from lora_recycle.runtime import plans


def quick(**changes):
    return InversionConfig(**{"images_per_class": 3, "iterations": 4, "stop_at": 1.0, **changes})


def by_name(plan):
    return {stage.name: stage for stage in plan.stages}


@pytest.fixture
def slow_steps(monkeypatch):
    """A clock that only steps move: by 2 seconds, and a second for each image, half of it where patches are pruned."""
    now, images = [0.0], []
    step = InversionBatch.step

    def counted(self):
        pruned = bool(self.config.prune) and self.iteration >= self.config.prune_start
        now[0] += 2 + len(self.labels) * (0.5 if pruned else 1.0)
        images.append(len(self.labels))
        return step(self)

    monkeypatch.setattr(plans, "clock", lambda: now[0])
    monkeypatch.setattr(InversionBatch, "step", counted)
    return now, images


@pytest.mark.parametrize("changes", [{}, {"batch_size": 5}, {"prune": {0: 0.5}, "prune_start": 2}, {"iterations": 1}])
def test_the_time_is_that_of_the_run(changes, tiny_pool, slow_steps, tmp_path):
    now, images = slow_steps
    inverter = LoRAInverter(tiny_pool, quick(**changes))
    plan = plan_inversion(inverter)
    begun = now[0]
    images.clear()
    inverter.run(tmp_path / "surrogate", progress=False)
    assert plan.seconds == by_name(plan)["optimise"].seconds == pytest.approx(now[0] - begun)


def test_images_that_stop_early_are_counted(tiny_pool, slow_steps, tmp_path):
    now, images = slow_steps
    inverter = LoRAInverter(tiny_pool, quick(iterations=30, stop_at=0.6, lr=0.2))
    plan = plan_inversion(inverter)
    begun = now[0]
    images.clear()
    inverter.run(tmp_path / "surrogate", progress=False)
    assert 5 * 12 * len(tiny_pool) < sum(images) < 0.9 * 30 * 12 * len(tiny_pool)  # some stop early, not at once
    assert plan.seconds == pytest.approx(now[0] - begun, rel=0.25)
    work = inversion_flops(tiny_pool.backbone).both * sum(images) / 1e9
    assert by_name(plan)["optimise"].gflops == pytest.approx(work, rel=0.25)
    assert "images stop after" in plan.notes[0]


def test_nothing_is_written_and_finished_shards_are_left_out(tiny_pool, tmp_path):
    folder = tmp_path / "surrogate"
    inverter = LoRAInverter(tiny_pool, quick())
    whole = plan_inversion(inverter, folder)
    assert not folder.exists() and by_name(whole)["read"].work == f"{len(tiny_pool)} adapters"
    inverter.run(folder, progress=False)
    shards = sorted((folder / "shards").iterdir())
    left = sum(path.stat().st_size for path in shards)
    assert 0.5 * left < whole.disk < 1.1 * left  # headers weigh as much as tiny images
    shards[0].unlink()
    before = sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))
    rest = plan_inversion(inverter, folder)
    assert by_name(rest)["read"].work == "1 adapters" and f"{len(tiny_pool) - 1} finished" in rest.notes[0]
    assert sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*")) == before
    with pytest.raises(ConfigError, match="another recipe"):
        plan_inversion(LoRAInverter(tiny_pool, quick(lr=0.3)), folder)


def test_no_iteration_costs_no_step(tiny_pool):
    plan = plan_inversion(LoRAInverter(tiny_pool, quick(iterations=0)))
    assert by_name(plan)["optimise"].seconds == 0 and by_name(plan)["optimise"].gflops == 0


def test_the_backbone_is_as_before(tiny_pool):
    before = {name: value.clone() for name, value in tiny_pool.backbone.state_dict().items()}
    plan_inversion(LoRAInverter(tiny_pool, quick(stop_at=0.9)))
    assert all(value.equal(before[name]) for name, value in tiny_pool.backbone.state_dict().items())
