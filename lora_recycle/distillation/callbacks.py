"""Callbacks of the training: the progress bar, experiment trackers, and the base class of a user's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from accelerate import Accelerator
from tqdm.auto import tqdm

from ..errors import ConfigError
from .config import DistillationConfig
from .selection import CheckpointSelection
from .student import Student


class TrainingState(Protocol):
    """What callbacks see of a [`MetaLoRATrainer`]; they may set `should_stop`."""

    config: DistillationConfig
    student: Student
    accelerator: Accelerator
    history: dict[str, list[float]]
    selection: CheckpointSelection
    should_stop: bool

    @property
    def host_share(self) -> float: ...


class TrainerCallback:
    """Base class of callbacks. Override what you need; each method is called in every process, at the same steps.

    Setting `trainer.should_stop` in one process ends the training of all after the next losses are read:

        class StopWhenLow(TrainerCallback):
            def on_log(self, trainer, step, values):
                trainer.should_stop |= values["loss"] < 0.01
    """

    def on_train_begin(self, trainer: TrainingState, step: int) -> None:
        """Before the first step, which is `step` where a run is resumed."""

    def on_step_end(self, trainer: TrainingState, step: int) -> None:
        """After step number `step` (from 0) was handed to the device."""

    def on_log(self, trainer: TrainingState, step: int, values: dict[str, float]) -> None:
        """The numbers of one step, in order but some steps late: each weighted loss by name, their sum `loss`,
        `grad_norm`, `lr`, and `skipped`, how many steps were left out so far. `trainer.student` may be newer."""

    def on_evaluate(self, trainer: TrainingState, step: int, figure: float) -> None:
        """After `step` steps, 0 at the start: the student's error on the classes of adapters that teach nothing, per
        cent. `on_log` was called for all these steps."""

    def on_train_end(self, trainer: TrainingState) -> None:
        """After the last step, also where the training was stopped or failed."""


class ProgressBar(TrainerCallback):
    """A bar on stderr, in the main process."""

    def on_train_begin(self, trainer: TrainingState, step: int) -> None:
        # the rate of all steps so far: that of the last ones jumps at each validation, and so would the time left
        bar = {"unit": "step", "initial": step, "total": trainer.config.steps, "smoothing": 0}
        self._bar = tqdm(desc="distill", disable=not trainer.accelerator.is_main_process, **bar)
        self._evaluated: dict[str, str] = {}

    def on_step_end(self, trainer: TrainingState, step: int) -> None:
        self._bar.update()

    def on_log(self, trainer: TrainingState, step: int, values: dict[str, float]) -> None:
        shown = {name: f"{values[name]:.3f}" for name in trainer.history}
        if values["skipped"]:
            shown["skipped"] = str(values["skipped"])
        shown |= self._evaluated
        self._bar.set_postfix(shown, host=f"{trainer.host_share:.1%}", refresh=False)

    def on_evaluate(self, trainer: TrainingState, step: int, figure: float) -> None:
        self._evaluated = {"held_out_error": f"{figure:.1f}%", "best_step": str(trainer.selection.best_step)}

    def on_train_end(self, trainer: TrainingState) -> None:
        self._bar.close()


class Trackers(TrainerCallback):
    """The numbers of every step and the settings to experiment trackers, from the main process.

    Args:
        names: of accelerate's trackers: `tensorboard`, `wandb`, `mlflow` ...
        folder: where those that write files put them.

    Raises:
        ConfigError: accelerate knows no such tracker, or its package is not installed.
    """

    def __init__(self, names: Sequence[str], folder: str | Path):
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

        known, available = [str(name) for name in LOGGER_TYPE_TO_CLASS], [str(n) for n in get_available_trackers()]
        for name in names:
            if name not in known:
                raise ConfigError(f"report_to: no tracker is called {name!r}. There are {', '.join(sorted(known))}.")
            if name not in available:
                raise ConfigError(f"report_to: {name} is not installed. Try `pip install {name}`.")
        self._classes, self._folder = [LOGGER_TYPE_TO_CLASS[name] for name in names], Path(folder)

    def on_train_begin(self, trainer: TrainingState, step: int) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._trackers = []
        settings = {k: v if isinstance(v, (bool, int, float)) else str(v) for k, v in trainer.config.to_dict().items()}
        for tracker_class in self._classes:
            folder = {"logging_dir": str(self._folder)} if tracker_class.requires_logging_directory else {}
            tracker = tracker_class("lora_recycle", **folder)
            tracker.start()
            tracker.store_init_configuration(settings)
            self._trackers.append(tracker)

    def on_log(self, trainer: TrainingState, step: int, values: dict[str, float]) -> None:
        for tracker in self._trackers:
            tracker.log(values, step=step)

    def on_evaluate(self, trainer: TrainingState, step: int, figure: float) -> None:
        for tracker in self._trackers:
            tracker.log({"held_out_error": figure}, step=step)

    def on_train_end(self, trainer: TrainingState) -> None:
        for tracker in self._trackers:
            tracker.finish()
