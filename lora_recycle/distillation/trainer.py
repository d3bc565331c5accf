"""MetaLoraTrainer: surrogate data of many adapters into one meta-LoRA (stage 2)."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar, cast

import torch
import torch.nn.functional as F

from ..embedded import backbone_name
from ..errors import ConfigError, DataError
from ..heartbeat import Heartbeat, beat, waiting
from ..interruption import Interruption
from ..locks import only_run_in
from ..pool import AdapterPool
from ..processes import deal, mixed_precision
from ..prototypes import centre_logits
from ..relations import relational_divergence
from ..rows import RowFile
from ..surrogate import SurrogateDataset
from .batches import Batch, BatchMaker, Prefetcher
from .callbacks import ProgressBar, TrainerCallback
from .checkpoints import Checkpoints
from .config import AVERAGES, PRINCIPAL_STARTS, DistillationConfig
from .episodes import EpisodeSampler, SurrogateEpisode, class_identities
from .images import SurrogateImages, leave_out, match_shards
from .parallel import ParallelStudent, gather_features
from .spikes import MOST_IN_A_ROW, SpikeGuard, longest_tail
from .student import Student
from .teachers import TeacherGroup, choose_teachers, teach
from .tokens import store_tokens


#: Steps between two looks at the losses: reading them makes the host wait for the device.
READ_EVERY = 10
#: Surrogate images whose activations CorDA looks at.
CORDA_IMAGES = 128


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
        self.student = self._start()
        #: loss of every step, by name
        self.history: dict[str, list[float]] = {}
        #: steps that were left out because their loss or gradient was not to be trusted
        self.skipped: list[int] = []
        #: set by a callback to end the training
        self.should_stop = False
        self._interrupted = False
        self._temporary: tempfile.TemporaryDirectory | None = None
        self._unread: list[tuple[int, float, dict[str, torch.Tensor]]] = []
        self._watching: list[TrainerCallback] = []
        self._seconds = {"model": 0.0, "host": 0.0}

    def _start(self) -> Student:
        config, pool = self.config, self.pool
        rank = config.rank * (2 if config.init in PRINCIPAL_STARTS else 1)
        base = backbone_name(pool.backbone.name)
        student = Student(pool.backbone, rank, base, config.seed, config.first_layer, config.peft_type)
        if config.init in AVERAGES:
            student.start_from_average(pool, pool.dilution() if config.init == "undiluted" else 1.0)
        elif config.init in PRINCIPAL_STARTS:
            shown = None
            if config.init == "corda":
                images = match_shards(pool, self.surrogate)
                shown = images.read("pixels", torch.linspace(0, len(images) - 1, CORDA_IMAGES).long())
            student.start_from_principal(config.init, pool, shown)
        return student

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
        """Run all steps and return the student.

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
                for step in range(start, self.config.steps):
                    self.step(step)
                    self._tell("on_step_end", step)
                    if self._look_up(step, output_dir, interruption):
                        break
                self._parallel.update_student()
                if self._interrupted:
                    interruption.deliver()
            finally:
                interruption.release()
                self.close()
                self._tell("on_train_end")
        return self.student

    def _look_up(self, step: int, output_dir: str | Path | None, interruption: Interruption) -> bool:
        """Now and then read the losses and save; whether training is to stop early.

        Ctrl-C and SIGTERM are seen after every step; several processes agree on them when they read their losses.
        """
        last = step + 1 == self.config.steps
        saving, stopping = last or (step + 1) % self.config.checkpoint_every == 0, False
        looking = saving or len(self._unread) >= READ_EVERY
        if looking or self.accelerator.num_processes == 1:
            self._interrupted = self._on_any(interruption.asked)
        if looking or self._interrupted:
            self._read_losses()
            stopping = self._on_any(self.should_stop) or self._interrupted
        sound = last or not longest_tail(self.skipped, step)  # what led to a spike is not to replace what did not
        if output_dir is not None and (stopping or (saving and sound)):
            self._save(output_dir, step + 1)
        return stopping

    def _save(self, output_dir: str | Path, step: int) -> None:
        with self._timed("host"):
            self._parallel.update_student()
            optimizer, parameters = self._parallel.whole_optimizer(), self.student.trainable()
            if self.accelerator.is_main_process:
                self._checkpoints(output_dir).save(parameters, optimizer, step, self.history)

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
        groups = self._ask_teachers(images, folder, shown)
        sampler = self._sampler(images, groups)
        groups = [group for group in groups if len(group.images) >= 4]
        if config.relational_weight and not groups:
            raise DataError("The relational loss needs at least 4 surrogate images in a group of adapters.")
        tokens = self._store_tokens(images, folder, shown) if config.first_layer else None
        sizes = (self.pool.backbone.patch_size, tokens, state.process_index, state.num_processes)
        self.make_batch = BatchMaker(config, images, groups, sampler, *sizes)
        # dropout of the backbone's own would only add noise, and make a resumed run another one
        self._parallel = ParallelStudent(self.student.eval(), state, config.lr)
        self._guard = SpikeGuard(config.spike_factor, state.device)
        start = 0 if output_dir is None else self._resume(output_dir)
        batches, end = config.gradient_accumulation_steps, config.steps * config.gradient_accumulation_steps
        self._prefetcher = Prefetcher(self.make_batch, end, pin_memory=state.device.type == "cuda")
        if start < config.steps:
            self._prefetcher.begin(start * batches)
        return start

    def _resume(self, output_dir: str | Path) -> int:
        optimizer, parameters = self._parallel.whole_optimizer(), self.student.trainable()
        start, self.history = self._checkpoints(output_dir).load(parameters, optimizer)
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

    def _sampler(self, images: SurrogateImages, groups: list[TeacherGroup]) -> EpisodeSampler | None:
        config = self.config
        if not (config.kl_weight or config.interpolation_weight):
            return None
        votes = {key: said for group in groups for key, said in group.votes.items()}
        identities = class_identities(images.shards, votes)
        return EpisodeSampler(images, identities, config.ways, config.shots, config.queries)

    def _ask_teachers(self, images: SurrogateImages, folder: Path, progress: bool) -> list[TeacherGroup]:
        """Targets of all groups. Processes that share the folder share the groups."""
        config = self.config
        nameless = any(not shard.adapter.get("labels") for shard in images.shards)
        if not (config.relational_weight or (config.interpolation_weight and nameless)):
            return []
        groups = self.pool.groups() if config.groups == "auto" else [list(range(len(self.pool)))]
        chosen = [(members, choose_teachers(members, config.max_teachers)) for members in groups]
        if self._temporary is None:
            with Heartbeat("ask teachers") as heart:
                for i in deal(len(chosen)):
                    teach(self.pool, images, *chosen[i], folder, progress)
                heart.wait_for_all()
        return [teach(self.pool, images, members, teachers, folder, progress) for members, teachers in chosen]

    def _store_tokens(self, images: SurrogateImages, folder: Path, progress: bool) -> RowFile:
        """Tokens that enter `first_layer`, written by the main process where processes share the folder."""
        config, state = self.config, self.accelerator
        parts = [config.init, config.rank, config.seed, config.first_layer, images.masked, state.mixed_precision]
        parts += [
            config.peft_type,
            self.pool.backbone.name,
            self.pool.backbone.revision,
            str(self.pool.backbone.dtype),
        ]
        parts += [[info.sha256 for info in self.pool.infos], images.checksums]
        path = folder / f"tokens-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]}.npy"
        with state.autocast():
            if self._temporary is None:
                with Heartbeat("store tokens") as heart:
                    if state.is_main_process:
                        store_tokens(self.student, images, path, progress)
                    heart.wait_for_all()
            return store_tokens(self.student, images, path, progress)

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
                self._note_spike(step, total)
            told = {"loss": total, "grad_norm": norm, "lr": rate}
            self._tell("on_log", step, {**values, **told, "skipped": len(self.skipped)})

    def _note_spike(self, step: int, loss: float) -> None:
        self.skipped.append(step)
        if (count := longest_tail(self.skipped, step)) >= MOST_IN_A_ROW:
            raise DataError(
                f"The loss is {loss:.6g} at step {step}: lower `lr` (now {self.config.lr}). The last {count} steps "
                "were left out, for losses or gradients that are not finite or losses above `spike_factor` "
                f"({self.config.spike_factor:g}) times their median; the last checkpoint is of before."
            )

    def _losses(self, batch: Batch) -> dict[str, torch.Tensor]:
        """All losses of a step from one forward of all its images."""
        config = self.config
        backbone, inputs = self.student.backbone, batch.inputs
        inputs = backbone.normalize(inputs) if inputs.dtype == torch.uint8 else inputs.to(backbone.dtype)
        with self.accelerator.autocast():
            features = self._parallel.model(inputs, batch.kept).float()
        waiting()
        features = gather_features(features, batch.count, self.accelerator)
        beat("backward")
        parts = [features[rows] for rows in batch.parts]
        losses = {}
        if batch.teachers:
            values = [
                relational_divergence(parts.pop(0), teacher.float(), config.similarity_scale)
                for teacher in batch.teachers
            ]
            losses["relational"] = config.relational_weight * torch.stack(values).mean()
        for episode, logits in zip(batch.episodes, batch.logits, strict=True):
            name = "kl" if logits is not None else "interpolation"
            weight = config.kl_weight if name == "kl" else config.interpolation_weight
            value = self._episode_loss(episode, parts.pop(0), parts.pop(0), logits) * weight / config.episodes
            losses[name] = losses.get(name, 0.0) + value
        return losses

    def _episode_loss(
        self,
        episode: SurrogateEpisode,
        support: torch.Tensor,
        query: torch.Tensor,
        teacher: torch.Tensor | None,
    ) -> torch.Tensor:
        """KL to the source adapter's head (Eq. 7 of LoRA Recycle, T = 1), or cross-entropy where no teacher fits."""
        config, (ways, queries) = self.config, episode.query.shape
        centres = support.view(ways, -1, support.shape[-1]).mean(1)
        logits = centre_logits(query, centres, config.metric, config.temperature)
        if teacher is None:
            return F.cross_entropy(logits, torch.arange(ways, device=logits.device).repeat_interleave(queries))
        return F.kl_div(logits.log_softmax(1), teacher.log_softmax(1), log_target=True, reduction="batchmean")

    def _checkpoints(self, output_dir: str | Path) -> Checkpoints:
        identity = {
            "config": self.config.to_dict(),
            "adapters": [info.sha256 for info in self.pool.infos],
            "surrogate": [entry["sha256"] for entry in self.surrogate.manifest["shards"]],
            "precision": [str(self.pool.backbone.dtype), self.accelerator.mixed_precision],
        }
        return Checkpoints(Path(output_dir), identity)


def learning_rate(config: DistillationConfig, step: int) -> float:
    """Step size at `step` (from 0): cosine with 5 % warm-up, or the paper's cycles of 25 + 75 steps."""
    if config.schedule == "cyclic":
        position = step % 100
        if position < 25:
            return 1e-5 + (config.lr - 1e-5) * position / 25
        return config.lr * (0.5 + 0.5 * math.cos(math.pi * (position - 25) / 75))
    warmup = max(1, round(0.05 * config.steps))
    rise = min(1.0, (step + 1) / warmup)
    return config.lr * rise * (0.5 + 0.5 * math.cos(math.pi * step / config.steps))
