"""MetaLoraTrainer: surrogate data of many adapters into one meta-LoRA (stage 2)."""

from __future__ import annotations

import contextlib
import functools
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar, cast

import torch
from accelerate.utils import broadcast

from ..backbones.backbone import Backbone
from ..errors import ConfigError, DataError
from ..pool.pool import AdapterPool
from ..runtime.heartbeat import Heartbeat, beat, waiting
from ..runtime.launch import mixed_precision
from ..runtime.run_lock import only_run_in
from ..runtime.signals import Interruption
from ..surrogate.dataset import SurrogateDataset
from .batches import Batch, BatchMaker, Prefetcher
from .callbacks import ProgressBar, TrainerCallback
from .checkpoints import Checkpoints
from .config import AVERAGES, DistillationConfig
from .episodes import make_sampler
from .judging import AVERAGE, Judge, Judgements, hold_out
from .losses import weighted_losses
from .parallel import ParallelStudent, gather_features
from .schedule import learning_rate
from .spikes import SpikeGuard, longest_tail, refuse_too_many
from .student import OWN, Blend, Student, start_student
from .surrogate_images import leave_out, match_shards
from .teachers import FEWEST, teach_all
from .tokens import tokens_entering


#: Steps between two looks at the losses: reading them makes the host wait for the device.
READ_EVERY = 10
logger = logging.getLogger(__name__)


Flag = TypeVar("Flag", bool, torch.Tensor)


class MetaLoraTrainer:
    """Distils the surrogate data of a pool into one LoRA.

    [`~MetaLoraTrainer.train`] does it all. To time or inspect single steps, `prepare` once and call `step` for one
    step number after the other; each is forward, backward and optimiser step on the batch that `train` would use:

        trainer = MetaLoraTrainer(pool, surrogate, DistillationConfig(steps=1000, relational_batch=32))
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
        surrogate ([`SurrogateDataset`], *optional*): from [`LoraInverter`]; not needed where `config.steps` is 0. It
            stays on disk: memory does not grow with it, but for 8 bytes an image.
        config ([`DistillationConfig`]): how.
        callbacks (`Sequence[TrainerCallback]`): who looks on, and may stop it early.

    Raises:
        DataError: no adapter's images reach `config.min_confidence`.
    """

    def __init__(
        self,
        pool: AdapterPool,
        surrogate: SurrogateDataset | None = None,
        config: DistillationConfig | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ):
        self.surrogate: SurrogateDataset = surrogate  # type: ignore[assignment]  # None only where no step needs it
        self.config, self.callbacks = config or DistillationConfig(), list(callbacks)
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
        #: what was judged by held-out adapters, and the best
        self.judged = Judgements()
        #: set by a callback to end the training
        self.should_stop = False
        self._interrupted = False
        self._temporary: tempfile.TemporaryDirectory | None = None
        self._unread: list[tuple[int, float, dict[str, torch.Tensor]]] = []
        self._watching: list[TrainerCallback] = []
        self._seconds = {"model": 0.0, "host": 0.0, "judging": 0.0}

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
        """Run all steps and return what was judged best by held-out adapters, which may be the average.

        With `output_dir`, checkpoints lie there, and a run that was killed goes on as if nothing had been; Ctrl-C and
        SIGTERM end it after a step that is saved. With `resume=False` the checkpoints there are deleted first.

        Raises:
            DataError: the surrogate data is of another pool, damaged, or has too few classes for an episode.
            ConfigError: `output_dir` holds a run of another recipe, pool or surrogate data.
            StorageError: another run is at work in `output_dir`, or nothing can be written there.
        """
        if self.config.steps == 0:
            return self.student
        with only_run_in(output_dir, self.accelerator.is_main_process):
            if output_dir is not None and not resume and self.accelerator.is_main_process:
                self._checkpoints(output_dir).clear()
            self.accelerator.wait_for_everyone()
            return self._train(output_dir, progress)

    def _train(self, output_dir: str | Path | None, progress: bool) -> Student:
        self._watching = [*([ProgressBar()] if progress else []), *self.callbacks]
        start = self.prepare(output_dir, progress=progress)
        interruption = Interruption(patient=self.accelerator.num_processes > 1)
        with Heartbeat("distill"):
            self._tell("on_train_begin", start)
            try:
                if start == 0:
                    self._judge(0)
                step = start
                while step < self.config.steps and not self._out_of_patience:
                    self.step(step)
                    self._tell("on_step_end", step)
                    step += 1
                    if self._look_up(step, output_dir, interruption):
                        break
                if not self._interrupted and step not in self.judged.steps:
                    self._judge(step)  # of a training that a callback ended
                self._parallel.update_student()
                if self._interrupted:
                    interruption.deliver()
                self._keep_the_best()
            finally:
                interruption.release()
                self.close()
                self._tell("on_train_end")
        self._say_what_is_kept()
        return self.student

    def _say_what_is_kept(self) -> None:
        """A warning where that is the start or was not judged; below the progress bar, which is closed by now."""
        if self.accelerator.is_main_process and self.config.held_out and not self.judged.best_step:
            logger.warning(self.judged.verdict())

    @property
    def _out_of_patience(self) -> bool:
        return 0 < self.config.patience <= self.judged.in_vain

    def _look_up(self, step: int, output_dir: str | Path | None, interruption: Interruption) -> bool:
        """Now and then, after `step` steps, read the losses, judge and save; whether training is to stop early.

        Ctrl-C and SIGTERM are seen after every step; several processes agree on them when they read their losses.
        """
        last = step == self.config.steps
        saving, judging = (
            last or step % every == 0 for every in (self.config.checkpoint_every, self.config.judge_every)
        )
        stopping = False
        looking = saving or judging or len(self._unread) >= READ_EVERY
        if looking or self.accelerator.num_processes == 1:
            self._interrupted = self._on_any(interruption.asked)
        if looking or self._interrupted:
            self._read_losses()
            if judging:
                self._judge(step)
            stopping = self._on_any(self.should_stop) or self._interrupted or self._out_of_patience
        sound = last or not longest_tail(self.skipped, step - 1)  # what led to a spike is not to replace what did not
        if output_dir is not None and (stopping or (saving and sound)):
            self._save(output_dir, step)
        return stopping

    def _save(self, output_dir: str | Path, step: int) -> None:
        with self._timed("host"):
            self._parallel.update_student()
            optimizer, parameters = self._parallel.whole_optimizer(), self.student.trainable()
            if self.accelerator.is_main_process:
                self._checkpoints(output_dir).save(parameters, optimizer, step, self.history, self.judged)

    def _tell(self, event: str, *values: object) -> None:
        for callback in self._watching:
            getattr(callback, event)(self, *values)

    def _on_any(self, flag: Flag) -> Flag:
        """Whether a flag is set in any process: all must do the same."""
        if self.accelerator.num_processes == 1:
            return flag
        device = self.accelerator.device
        total = self.accelerator.reduce(torch.as_tensor(flag, dtype=torch.float32, device=device), "sum") > 0
        return total if isinstance(flag, torch.Tensor) else bool(total)

    def prepare(self, output_dir: str | Path | None = None, *, progress: bool = True) -> int:
        """Everything before the first step: data checked, teachers asked, optimiser made, checkpoint loaded.

        Returns the step to go on with. What the teachers said lies in `output_dir`, in a temporary folder without.
        """
        config = self.config
        images = match_shards(self.pool, self.surrogate, config.use_masks)
        folder = Path(output_dir) / "stored" if output_dir is not None else None
        if folder is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="lora-recycle-")
            folder = Path(self._temporary.name)
        state, shown = self.accelerator, progress and self.accelerator.is_main_process
        shared = self._temporary is None
        alike = self.pool.groups() if config.groups == "auto" else [list(range(len(self.pool)))]
        held_out = hold_out(alike, images, config.held_out)
        teachers = [[i for i in members if i not in held_out] for members in alike]
        groups = teach_all(self.pool, images, teachers, config, folder, shared, shown)
        sampler = make_sampler(images, config, groups, held_out)
        groups = [group for group in groups if len(group.images) >= FEWEST]
        if config.relational_weight and not groups:
            raise DataError(f"The relational loss needs at least {FEWEST} surrogate images in a group of adapters.")
        tokens = tokens_entering(self.student, images, config, self.pool, state, folder, shared, shown)
        sizes = (self.pool.backbone.patch_size, tokens, state.process_index, state.num_processes)
        self.make_batch = BatchMaker(config, images, groups, sampler, *sizes)
        # dropout of the backbone's own would only add noise, and make a resumed run another one
        self._parallel = ParallelStudent(self.student.eval(), state, config.lr)
        self._judging = Judge(held_out, self.make_batch, config.metric, config.seed) if held_out else None
        group_of = {i: number for number, members in enumerate(alike) for i in members}
        self.judged = Judgements([self.pool.infos[i].name for i in held_out], [group_of[i] for i in held_out])
        self._guard = SpikeGuard(config.spike_factor, state.device)
        start = 0 if output_dir is None else self._resume(output_dir)
        batches, end = config.gradient_accumulation_steps, config.steps * config.gradient_accumulation_steps
        self._prefetcher = Prefetcher(self.make_batch, end, pin_memory=state.device.type == "cuda")
        if start < config.steps:
            self._prefetcher.begin(start * batches)
        return start

    def _resume(self, output_dir: str | Path) -> int:
        optimizer, parameters = self._parallel.whole_optimizer(), self.student.trainable()
        start, self.history = self._checkpoints(output_dir).load(parameters, optimizer, self.judged)
        if start == 0:
            return 0
        self._parallel.take(optimizer)
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
                found = self._losses(batch.map(lambda t: t.to(self.accelerator.device, non_blocking=True)))
                total = cast(torch.Tensor, sum(found.values()))
                (total * (self._parallel.loss_scale / batches)).backward()
                for name, value in found.items():
                    losses[name] = losses.get(name, 0.0) + value.detach() / batches
        with self._timed("model"):
            norm = self._parallel.gradient_norm(self.config.max_grad_norm)
            skip = self._on_any(self._guard(cast(torch.Tensor, sum(losses.values()))) | ~norm.isfinite())
            self._parallel.step(skip)
        self._unread.append((step, rate, {**losses, "grad_norm": norm, "skip": skip}))
        return losses

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._parallel.optimizer

    def _read_losses(self) -> None:
        """Move the losses of the last steps to `history`: the one place that waits for the device."""
        with self._timed("model"):
            found = [
                (step, rate, {name: v.item() for name, v in values.items()}) for step, rate, values in self._unread
            ]
        self._unread.clear()
        for step, rate, values in found:
            norm, skip = values.pop("grad_norm"), values.pop("skip")
            for name, value in values.items():
                self.history.setdefault(name, []).append(value)
            total = sum(values.values())
            if skip:
                self.skipped.append(step)
                refuse_too_many(self.skipped, total, self.config)
            told = {"loss": total, "grad_norm": norm, "lr": rate}
            self._tell("on_log", step, {**values, **told, "skipped": len(self.skipped)})

    def _losses(self, batch: Batch) -> dict[str, torch.Tensor]:
        """All losses of a step from one forward of all its images."""
        features = self._embed(batch.inputs, batch.kept, batch.count)
        beat("backward")
        return weighted_losses(self.config, features, batch)

    def _embed(
        self, inputs: torch.Tensor, kept: torch.Tensor | None, count: int, other: Backbone | None = None
    ) -> torch.Tensor:
        """Features (count, D), float32, of the images of which this process forwards its share, from the student or
        from an `other` network."""
        backbone, forward = (self.student.backbone, self._parallel.model) if other is None else (other, other.features)
        inputs, kept = inputs.to(backbone.device), None if kept is None else kept.to(backbone.device)
        inputs = backbone.normalize(inputs) if inputs.dtype == torch.uint8 else inputs.to(backbone.dtype)
        with self.accelerator.autocast():
            features = forward(inputs, kept).float()
        waiting()
        return gather_features(features, count, self.accelerator)

    def _judge(self, step: int) -> None:
        """How good the student is after `step` steps, as it would be kept; of the best so far the weights are kept."""
        if self._judging is None:
            return
        self._read_losses()
        with self._timed("judging"):
            self._parallel.update_student()
            if step == 0 and self._has_average:
                with self.pool.folded() as average:
                    self._note(step, AVERAGE, self._judging(functools.partial(self._embed, other=average)))
            blend = Blend(0.0, 1.0) if self.config.blends and step == 0 else self._to_keep
            with self._parallel.blended(blend):
                errors = self._judging(self._embed)
            self._parallel.reshard()
            self._note(step, blend, errors)
        self._tell("on_judge", step, self.judged.figures[-1])

    @property
    def _to_keep(self) -> Blend:
        """What the recipe keeps of a student that has learnt."""
        return Blend(self.config.share, 1 - self.config.share) if self.config.blends else OWN

    @property
    def _has_average(self) -> bool:
        """Whether the pool's average is not itself the start; tokens of `first_layer` are of the start alone."""
        scaled = self.config.init in AVERAGES and self.config.init != "average"
        return scaled and self.config.first_layer == 0 and len(self.pool.groups()) > 1

    def _note(self, step: int, blend: Blend, errors: torch.Tensor) -> None:
        self.judged.add(step, blend, broadcast(errors.to(self.accelerator.device)), self.student.trainable())

    def _keep_the_best(self) -> None:
        """Set the student to what was judged best; unjudged, to the last step, blended as the recipe has it."""
        best = self.judged.put_on_best(self.student.trainable())
        if best == AVERAGE:
            self.student.start_from_average(self.pool)
        else:
            self.student.blend(self._to_keep if best is None else best)

    def _checkpoints(self, output_dir: str | Path) -> Checkpoints:
        identity = {
            "config": self.config.to_dict(),
            "adapters": [info.sha256 for info in self.pool.infos],
            "surrogate": [entry["sha256"] for entry in self.surrogate.manifest["shards"]],
            "precision": [str(self.pool.backbone.dtype), self.accelerator.mixed_precision],
        }
        return Checkpoints(Path(output_dir), identity)
