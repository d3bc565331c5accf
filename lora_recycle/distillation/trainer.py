"""MetaLoRATrainer: surrogate data of many adapters into one meta-LoRA (stage 2)."""

from __future__ import annotations

import contextlib
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from ..errors import ConfigError
from ..modeling.meta_lora import MetaLoRAForFewShotClassification
from ..pool.pool import AdapterPool
from ..runtime.heartbeat import Heartbeat, beat
from ..runtime.launch import mixed_precision
from ..runtime.run_lock import only_run_in
from ..runtime.signals import Interruption
from ..surrogate.dataset import SurrogateDataset
from .batches import Batch, Prefetcher
from .callbacks import ProgressBar, TrainerCallback
from .checkpoints import OUTPUT, Checkpoints, run_identity
from .config import DistillationConfig
from .experts import expert_networks
from .losses import weighted_losses
from .parallel import ParallelStudent, on_any
from .preparation import DiskStore, Store, prepare
from .saving import sidecar_settings
from .schedule import learning_rate
from .selection import CheckpointSelection, StudentCandidates, keep_best
from .spikes import SpikeGuard, longest_tail, refuse_too_many
from .student import Student, start_student
from .surrogate_images import leave_out


#: Steps between two looks at the losses: reading them makes the host wait for the device.
READ_EVERY = 10
logger = logging.getLogger(__name__)


class MetaLoRATrainer:
    """Distils the surrogate data of a pool into one LoRA.

    [`~MetaLoRATrainer.train`] does it all. To time or inspect single steps, `prepare` once and call `step` for one
    step number after the other; each is forward, backward and optimiser step on the batch that `train` would use:

        trainer = MetaLoRATrainer(pool, surrogate, DistillationConfig(steps=1000, relational_batch=32))
        trainer.prepare()
        for i in range(10):
            losses = trainer.step(i)  # name to a tensor without gradient, still on the device
        trainer.close()
        print(trainer.host_share)

    Any folder of shards ([`save_shard`], [`write_manifest`]) is surrogate data: random `pixels`, `labels`,
    `teacher_logits`, `teacher_features` and sorted random `kept_tokens` do for timing, with the SHA-256 of the pool's
    adapters in `adapter["sha256"]`.

    On several processes (`accelerate launch`) each step has the images that it has on one, shared out to them.

    Args:
        pool ([`AdapterPool`]): the adapters that the surrogate data came from. They give the initialisation and teach
            the relational loss; their real training data is never needed.
        surrogate ([`SurrogateDataset`], *optional*): from [`LoRAInverter`]; not needed where `config.steps` is 0. It
            stays on disk: memory does not grow with it, but for 8 bytes an image.
        config ([`DistillationConfig`]): how.
        callbacks (`Sequence[TrainerCallback]`): see the numbers of each step, and may stop the training early.

    Raises:
        DataError: no adapter's images reach `config.min_confidence`.
    """

    def __repr__(self) -> str:
        return f"MetaLoRATrainer({self.pool!r}, {self.surrogate!r}, steps={self.config.steps})"

    def __init__(
        self,
        pool: AdapterPool,
        surrogate: SurrogateDataset | None = None,
        config: DistillationConfig | dict[str, Any] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ):
        self.surrogate: SurrogateDataset = surrogate  # type: ignore[assignment]  # None only where no step needs it
        self.config, self.callbacks = DistillationConfig.of(config), list(callbacks)
        if surrogate is None and (self.config.steps > 0 or self.config.init == "corda"):
            raise ConfigError("Distillation needs surrogate data; only `steps: 0` goes without, and not with corda.")
        #: adapters that are left out, and why
        self.excluded: list[tuple[str, str]] = []
        if surrogate is not None:
            pool, self.excluded = leave_out(pool, surrogate, self.config.min_confidence)
        self.pool, self.accelerator = pool, mixed_precision()
        self.student = start_student(self.config, pool, surrogate)
        #: loss of every step, by name
        self.history: dict[str, list[float]] = {}
        #: steps that were left out because their loss or gradient was not to be trusted
        self.skipped: list[int] = []
        #: what was evaluated on held-out adapters, and the best
        self.selection = CheckpointSelection()
        #: set by a callback to end the training
        self.should_stop = False
        self._interrupted = False
        self._temporary: tempfile.TemporaryDirectory | None = None
        self._candidates: StudentCandidates | None = None
        self._unread: list[tuple[int, float, dict[str, torch.Tensor]]] = []
        self._watching: list[TrainerCallback] = []
        self._seconds = {"model": 0.0, "host": 0.0, "evaluation": 0.0}

    @property
    def host_share(self) -> float:
        """Share of the time of all steps so far in which the model waited for this process: for batches, checkpoints
        and bookkeeping. Where the device works on its own queue meanwhile, this is an upper bound."""
        return self._seconds["host"] / max(1e-9, sum(self._seconds.values()))

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._seconds[name] += time.perf_counter() - started

    def train(self, output_dir: str | Path | None = None, *, progress: bool = True, resume: bool = True) -> Student:
        """Run all steps and return the student that is best on held-out adapters, which may be the average.

        With `output_dir`, checkpoints are written there and a killed run resumes exactly where it stopped; Ctrl-C and
        SIGTERM end it after a step that is saved. With `resume=False` the checkpoints there are deleted first.

        Raises:
            DataError: the surrogate data is of another pool, damaged, or has too few classes for an episode.
            ConfigError: `output_dir` holds a run of another recipe, pool or surrogate data.
            StorageError: another run is at work in `output_dir`, it holds something else than checkpoints, or nothing
                can be written there.
        """
        if self.config.steps == 0:
            return self.student
        with only_run_in(output_dir, OUTPUT, needed=self.accelerator.is_main_process):
            if output_dir is not None and not resume and self.accelerator.is_main_process:
                self._checkpoints(output_dir).clear()
            self.accelerator.wait_for_everyone()
            return self._train(output_dir, progress)

    def _train(self, output_dir: str | Path | None, progress: bool) -> Student:
        self._watching = [*([ProgressBar()] if progress else []), *self.callbacks]
        start = self.prepare(output_dir, progress=progress)
        interruption = Interruption(patient=self.accelerator.num_processes > 1)
        with Heartbeat("distill"):
            self._notify("on_train_begin", start)
            try:
                if start == 0:
                    self._evaluate(0)
                step = start
                while step < self.config.steps and not self._out_of_patience:
                    self.step(step)
                    self._notify("on_step_end", step)
                    step += 1
                    if self._look_up(step, output_dir, interruption):
                        break
                if not self._interrupted and step not in self.selection.steps:
                    self._evaluate(step)  # of a training that a callback ended
                if self._interrupted:
                    interruption.deliver()
                keep_best(self.student, self.pool, self.config, self.selection)
            finally:
                interruption.release()
                self.close()
                self._notify("on_train_end")
        self._report_selection()
        return self.student

    def to_model(self) -> MetaLoRAForFewShotClassification:
        """The student as the model that users load; its sidecar says where it came from."""
        settings = sidecar_settings(self.pool, self.surrogate, self.config, self.selection, self.accelerator)
        model = self.student.to_model(settings)
        if self.config.experts:
            model.domain_networks = expert_networks(self.pool, model.backbone, self.config.expert_rank)
        if self.surrogate is not None:
            model.picture = self.surrogate.picture()
        return model

    def _report_selection(self) -> None:
        """Warn where the start is kept or nothing was evaluated; the progress bar is closed by now."""
        if self.accelerator.is_main_process and self.config.validation_fraction and not self.selection.best_step:
            logger.warning(self.selection.verdict())

    @property
    def _out_of_patience(self) -> bool:
        return 0 < self.config.patience <= self.selection.evaluations_since_best

    def _look_up(self, step: int, output_dir: str | Path | None, interruption: Interruption) -> bool:
        """Now and then, after `step` steps, read the losses, evaluate and save; whether training is to stop early.

        Ctrl-C and SIGTERM are seen after every step; several processes agree on them when they read their losses.
        """
        last = step == self.config.steps
        saving, evaluating = (last or step % every == 0 for every in (self.config.save_steps, self.config.eval_steps))
        stopping = False
        looking = saving or evaluating or len(self._unread) >= READ_EVERY
        if looking or self.accelerator.num_processes == 1:
            self._interrupted = on_any(self.accelerator, interruption.asked)
        if looking or self._interrupted:
            self._read_losses()
            if evaluating:
                self._evaluate(step)
            stopping = on_any(self.accelerator, self.should_stop) or self._interrupted or self._out_of_patience
        sound = last or not longest_tail(self.skipped, step - 1)  # what led to a spike is not to replace what did not
        if output_dir is not None and (stopping or (saving and sound)):
            self._save(output_dir, step)
        return stopping

    def _save(self, output_dir: str | Path, step: int) -> None:
        if self.accelerator.is_main_process:
            with self._timed("host"):
                parameters = self.student.trainable()
                self._checkpoints(output_dir).save(parameters, self.optimizer, step, self.history, self.selection)

    def _notify(self, event: str, *values: object) -> None:
        for callback in self._watching:
            getattr(callback, event)(self, *values)

    def prepare(self, output_dir: str | Path | None = None, *, progress: bool = True) -> int:
        """All work before the first step: check data, query teachers, create the optimiser, load a checkpoint.

        Returns the step to resume at. The teachers' outputs are stored in `output_dir`, or in a temporary folder.
        """
        shown = progress and self.accelerator.is_main_process
        if output_dir is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="lora-recycle-")
            folder = Path(self._temporary.name)
        else:
            folder = Path(output_dir) / "stored"
        return self.prepare_from(DiskStore(folder, shared=output_dir is not None, progress=shown), output_dir)

    def prepare_from(self, store: Store, output_dir: str | Path | None = None) -> int:
        """`prepare` with what teachers said from a store of the caller's."""
        state = self.accelerator
        prepared = prepare(self.student, self.pool, self.surrogate, self.config, state, store)
        self.make_batch, held_out, self.selection = prepared
        # dropout of the backbone's own would only add noise, and make a resumed run another one
        self._parallel = ParallelStudent(self.student.eval(), state, self.config.lr)
        sources = self.student, self.pool, self.config, self._parallel
        self._candidates = None if held_out is None else StudentCandidates(*sources, held_out, self.selection)
        self._guard = SpikeGuard(self.config.spike_factor, state.device)
        start = 0 if output_dir is None else self._resume(output_dir)
        batches = self.config.gradient_accumulation_steps
        pin_memory = state.device.type == "cuda"
        self._prefetcher = Prefetcher(self.make_batch, self.config.steps * batches, pin_memory=pin_memory)
        if start < self.config.steps:
            self._prefetcher.begin(start * batches)
        return start

    def _resume(self, output_dir: str | Path) -> int:
        checkpoints, parameters = self._checkpoints(output_dir), self.student.trainable()
        start, self.history = checkpoints.load(parameters, self.optimizer, self.selection)
        if start:
            steps = zip(*self.history.values(), strict=True)
            self.skipped = self._guard.replay(
                [sum((torch.tensor(v) for v in values), torch.zeros(())) for values in steps]
            )
        return start

    def close(self) -> None:
        """End the thread that reads batches, delete the temporary folder, bring `history` up to date."""
        self._prefetcher.close()
        if self._temporary is not None:
            self._temporary.cleanup()
        self._read_losses()

    def step(self, step: int) -> dict[str, torch.Tensor]:
        """One training step, on the batches of this number; the next batch is read meanwhile.

        A step whose loss or gradient is not finite, or whose loss is a spike, moves nothing; it is in `skipped` once
        it was read.

        Returns the weighted losses by name, on the device: reading them waits for it.
        """
        beat(f"step {step}")
        rate = learning_rate(self.config, step)
        losses: dict[str, torch.Tensor] = {}
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        batches = self.config.gradient_accumulation_steps
        for number in range(step * batches, (step + 1) * batches):
            with self._timed("host"):
                batch = self._prefetcher.get(number)
            with self._timed("model"):
                step_losses = self._losses(batch.map(lambda t: t.to(self.accelerator.device, non_blocking=True)))
                total = cast(torch.Tensor, sum(step_losses.values()))
                (total * (self._parallel.loss_scale / batches)).backward()
                for name, value in step_losses.items():
                    losses[name] = losses.get(name, 0.0) + value.detach() / batches
        with self._timed("model"):
            norm = self._parallel.gradient_norm(self.config.max_grad_norm)
            skip = on_any(self.accelerator, self._guard(cast(torch.Tensor, sum(losses.values()))) | ~norm.isfinite())
            self._parallel.step(skip)
        self._unread.append((step, rate, {**losses, "grad_norm": norm, "skip": skip}))
        return losses

    @property
    def candidates(self) -> StudentCandidates:
        """Evaluates the student on held-out adapters; only where there are some."""
        assert self._candidates is not None, "no adapter is held out"
        return self._candidates

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._parallel.optimizer

    def _read_losses(self) -> None:
        """Move the losses of the last steps to `history`: the one place that waits for the device."""
        with self._timed("model"):
            steps = [
                (step, rate, {name: v.item() for name, v in values.items()}) for step, rate, values in self._unread
            ]
        self._unread.clear()
        for step, rate, values in steps:
            norm, skip = values.pop("grad_norm"), values.pop("skip")
            for name, value in values.items():
                self.history.setdefault(name, []).append(value)
            total = sum(values.values())
            if skip:
                self.skipped.append(step)
                refuse_too_many(self.skipped, total, self.config)
            summary = {"loss": total, "grad_norm": norm, "lr": rate, "skipped": len(self.skipped)}
            self._notify("on_log", step, {**values, **summary})

    def _losses(self, batch: Batch) -> dict[str, torch.Tensor]:
        """All losses of a step from one forward of all its images."""
        features = self._parallel.embed(batch.inputs, batch.kept, batch.count)
        beat("backward")
        return weighted_losses(self.config, features, batch)

    def _evaluate(self, step: int) -> None:
        """Evaluate the student after `step` steps, as it would be kept; of the best so far the weights are kept."""
        if self._candidates is None:
            return
        self._read_losses()
        with self._timed("evaluation"):
            self._candidates.evaluate(step)
        self._notify("on_evaluate", step, self.selection.figures[-1])

    def _checkpoints(self, output_dir: str | Path) -> Checkpoints:
        adapters, data = [info.sha256 for info in self.pool.infos], self.surrogate.manifest["shards"]
        precision = [str(self.pool.backbone.dtype), self.accelerator.mixed_precision]
        return Checkpoints(Path(output_dir), run_identity(self.config, adapters, data, precision))
