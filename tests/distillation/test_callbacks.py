"""Who looks on while a meta-LoRA is trained."""

from types import SimpleNamespace

import pytest

from lora_recycle.distillation.callbacks import ProgressBar, Trackers, TrainerCallback
from lora_recycle.distillation.config import DistillationConfig
from lora_recycle.distillation.trainer import MetaLoRATrainer
from lora_recycle.errors import ConfigError


def recipe(**changes):
    return DistillationConfig(**{"steps": 25, "rank": 2, "relational_batch": 8, "groups": "one", **changes})


class Notes(TrainerCallback):
    def __init__(self, stop_at=None, fail_at=None):
        self.events, self.stop_at, self.fail_at = [], stop_at, fail_at

    def on_train_begin(self, trainer, step):
        self.events.append(("begin", step))

    def on_step_end(self, trainer, step):
        self.events.append(("step", step))
        if step == self.fail_at:
            raise RuntimeError("planted")

    def on_log(self, trainer, step, values):
        self.events.append(("log", step, values))
        trainer.should_stop |= step == self.stop_at

    def on_train_end(self, trainer):
        self.events.append(("end",))

    def of(self, kind):
        return [event[1] for event in self.events if event[0] == kind]


def test_callbacks_see_every_step_in_order(tiny_pool, tiny_surrogate, capsys):
    notes = Notes()
    trainer = MetaLoRATrainer(tiny_pool, tiny_surrogate, recipe(), callbacks=[notes])
    trainer.train()
    assert notes.events[0] == ("begin", 0) and notes.events[-1] == ("end",)
    assert notes.of("step") == notes.of("log") == list(range(25))
    values = [event[2] for event in notes.events if event[0] == "log"]
    assert [v["relational"] for v in values] == [v["loss"] for v in values] == trainer.history["relational"]
    assert all(v["grad_norm"] > 0 and v["skipped"] == 0 for v in values) and values[-1]["lr"] < values[5]["lr"]
    bar = capsys.readouterr().err
    assert "25/25" in bar and "relational=" in bar


def test_a_callback_stops_early_and_what_there_is_is_saved(tiny_pool, tiny_surrogate, tmp_path):
    config = recipe(save_steps=100)
    first = MetaLoRATrainer(tiny_pool, tiny_surrogate, config, callbacks=[Notes(stop_at=12)])
    first.train(tmp_path, progress=False)
    assert len(first.history["relational"]) == 20  # losses are read every ten steps
    notes = Notes()
    MetaLoRATrainer(tiny_pool, tiny_surrogate, config, callbacks=[notes]).train(tmp_path, progress=False)
    assert notes.events[0] == ("begin", 20) and notes.of("step") == list(range(20, 25))


def test_the_end_is_told_after_a_failure_too(tiny_pool, tiny_surrogate):
    notes = Notes(fail_at=3)
    with pytest.raises(RuntimeError, match="planted"):
        MetaLoRATrainer(tiny_pool, tiny_surrogate, recipe(), callbacks=[notes]).train(progress=False)
    assert notes.events[-1] == ("end",) and notes.of("log") == [0, 1, 2, 3]


def test_tensorboard_gets_the_numbers_of_every_step(tiny_pool, tiny_surrogate, tmp_path):
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trackers = Trackers(["tensorboard"], tmp_path)
    trainer = MetaLoRATrainer(tiny_pool, tiny_surrogate, recipe(steps=12), callbacks=[trackers])
    trainer.train(progress=False)
    events = loader.EventAccumulator(str(tmp_path / "lora_recycle"))
    events.Reload()
    assert set(events.Tags()["scalars"]) >= {"relational", "loss", "grad_norm", "lr", "skipped", "held_out_error"}
    assert [event.step for event in events.Scalars("held_out_error")] == [0, 12]
    found = events.Scalars("relational")
    assert [event.step for event in found] == list(range(12))
    assert [event.value for event in found] == pytest.approx(trainer.history["relational"])


@pytest.mark.parametrize(("name", "told"), [("paper", "no tracker is called 'paper'"), ("wandb", "is not installed")])
def test_trackers_that_are_not_there(tmp_path, monkeypatch, name, told):
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    with pytest.raises(ConfigError, match=told):
        Trackers([name], tmp_path)


def test_the_bar_calls_an_error_an_error():
    bar = ProgressBar()
    bar.on_evaluate(SimpleNamespace(selection=SimpleNamespace(best_step=20)), 20, 66.94)
    assert bar._evaluated == {"held_out_error": "66.9%", "best_step": "20"}
