"""MetaLoraTrainer: surrogate data of many adapters into one meta-LoRA (stage 2)."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from tqdm.auto import tqdm

from ..embedded import backbone_name
from ..errors import ConfigError, DataError
from ..pool import AdapterPool
from ..processes import process_state
from ..prototypes import centre_logits
from ..relations import relational_divergence
from ..rows import RowFile
from ..surrogate import SurrogateDataset
from .batches import Batch, BatchMaker, Prefetcher
from .checkpoints import load_checkpoint, save_checkpoint
from .config import PRINCIPAL_STARTS, DistillationConfig
from .episodes import EpisodeSampler, SurrogateEpisode, class_identities
from .images import SurrogateImages, match_shards
from .student import Student
from .teachers import TeacherGroup, choose_teachers, teach
from .tokens import store_tokens


#: Steps between two looks at the losses: reading them makes the host wait for the device.
READ_EVERY = 10
#: Surrogate images whose activations CorDA looks at.
CORDA_IMAGES = 128


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

    Args:
        pool ([`AdapterPool`]): the adapters that the surrogate data came from. They give the initialisation and teach
            the relational loss; their real training data is never needed.
        surrogate ([`SurrogateDataset`], *optional*): from [`LoraInverter`]; not needed where `config.steps` is 0. It
            stays on disk: memory does not grow with it, but for 8 bytes an image.
        config ([`DistillationConfig`]): how.
    """

    def __init__(
        self, pool: AdapterPool, surrogate: SurrogateDataset | None = None, config: DistillationConfig | None = None
    ):
        self.pool, self.surrogate, self.config = pool, surrogate, config or DistillationConfig()
        if surrogate is None and (self.config.steps > 0 or self.config.init == "corda"):
            raise ConfigError("Distillation needs surrogate data; only `steps: 0` goes without, and not with corda.")
        process_state()
        self.accelerator = Accelerator()
        self.student = self._start()
        #: loss of every step, by name
        self.history: dict[str, list[float]] = {}
        self._temporary: tempfile.TemporaryDirectory | None = None
        self._unread: list[tuple[int, dict[str, torch.Tensor]]] = []
        self._seconds = {"model": 0.0, "host": 0.0}

    def _start(self) -> Student:
        config, pool = self.config, self.pool
        rank = config.rank * (2 if config.init in PRINCIPAL_STARTS else 1)
        base = backbone_name(pool.backbone.name)
        student = Student(pool.backbone, rank, base, config.seed, config.first_layer, config.peft_type)
        if config.init == "average":
            student.start_from_average(pool)
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

    def train(self, output_dir: str | Path | None = None, *, progress: bool = True) -> Student:
        """Run all steps and return the student. With `output_dir`, checkpoints lie there and a killed run resumes.

        Raises:
            DataError: the surrogate data is of another pool, damaged, or has too few classes for an episode.
        """
        if self.config.steps == 0:
            return self.student
        shown = progress and self.accelerator.is_main_process
        start = self.prepare(output_dir, progress=progress)
        steps, options = range(start, self.config.steps), {"desc": "distill", "unit": "step", "disable": not shown}
        try:
            for step in (bar := tqdm(steps, initial=start, total=self.config.steps, **options)):
                self.step(step)
                saving = (step + 1) % self.config.checkpoint_every == 0 or step + 1 == self.config.steps
                if saving or len(self._unread) >= READ_EVERY:
                    self._read_losses()
                    shown = {name: f"{values[-1]:.3f}" for name, values in self.history.items()}
                    bar.set_postfix(**shown, host=f"{self.host_share:.1%}")
                if saving and output_dir is not None and self.accelerator.is_main_process:
                    path = Path(output_dir) / "checkpoint.safetensors"
                    parameters = self.student.trainable()
                    with self._timed("host"):
                        save_checkpoint(path, parameters, self.optimizer, step + 1, self._identity(), self.history)
        finally:
            self.close()
        return self.student

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
        optimizer = torch.optim.Adam(self.student.eval().trainable(), lr=config.lr, fused=True)
        self._student, self.optimizer = self.accelerator.prepare(self.student, optimizer)
        start, checkpoint = 0, None if output_dir is None else Path(output_dir) / "checkpoint.safetensors"
        if checkpoint is not None and checkpoint.is_file():
            parameters = self.student.trainable()
            start, self.history = load_checkpoint(checkpoint, parameters, self.optimizer, self._identity())
        self._prefetcher = Prefetcher(self.make_batch, config.steps, pin_memory=state.device.type == "cuda")
        if start < config.steps:
            self._prefetcher.begin(start)
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
        config, state = self.config, self.accelerator
        nameless = any(not shard.adapter.get("labels") for shard in images.shards)
        if not (config.relational_weight or (config.interpolation_weight and nameless)):
            return []
        groups = self.pool.groups() if config.groups == "auto" else [list(range(len(self.pool)))]
        chosen = [(members, choose_teachers(members, config.max_teachers)) for members in groups]
        if self._temporary is None:
            for members, teachers in chosen[state.process_index :: state.num_processes]:
                teach(self.pool, images, members, teachers, folder, progress)
            state.wait_for_everyone()
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
            if state.is_main_process:
                store_tokens(self.student, images, path, progress)
            if self._temporary is None:
                state.wait_for_everyone()
            return store_tokens(self.student, images, path, progress=False)

    def step(self, step: int) -> dict[str, torch.Tensor]:
        """One training step, on the batch of this number; the next batch is read meanwhile.

        Returns the weighted losses by name, on the device: reading them waits for it.
        """
        with self._timed("host"):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.config, step)
            batch = self._prefetcher.get(step)
        with self._timed("model"):
            losses = self._losses(batch.map(lambda t: t.to(self.accelerator.device, non_blocking=True)))
            self.optimizer.zero_grad()
            self.accelerator.backward(sum(losses.values()))
            self.optimizer.step()
            losses = {name: value.detach() for name, value in losses.items()}
        self._unread.append((step, losses))
        return losses

    def _read_losses(self) -> None:
        """Move the losses of the last steps to `history`: the one place that waits for the device."""
        with self._timed("model"):
            found = [(step, {name: value.item() for name, value in losses.items()}) for step, losses in self._unread]
        self._unread.clear()
        for step, values in found:
            if not math.isfinite(sum(values.values())):
                raise DataError(
                    f"The loss is {sum(values.values())} at step {step}: lower `lr` (now {self.config.lr})."
                )
            for name, value in values.items():
                self.history.setdefault(name, []).append(value)

    def _losses(self, batch: Batch) -> dict[str, torch.Tensor]:
        """All losses of a step from one forward of all its images."""
        config = self.config
        backbone, inputs = self.student.backbone, batch.inputs
        inputs = backbone.normalize(inputs) if inputs.dtype == torch.uint8 else inputs.to(backbone.dtype)
        features = self._student(inputs, batch.kept).float()
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

    def _episode_loss(self, episode: SurrogateEpisode, support, query, teacher: torch.Tensor | None) -> torch.Tensor:
        """KL to the source adapter's head (Eq. 7 of LoRA Recycle, T = 1), or cross-entropy where no teacher fits."""
        config, (ways, queries) = self.config, episode.query.shape
        centres = support.view(ways, -1, support.shape[-1]).mean(1)
        logits = centre_logits(query, centres, config.metric, config.temperature)
        if teacher is None:
            return F.cross_entropy(logits, torch.arange(ways, device=logits.device).repeat_interleave(queries))
        return F.kl_div(logits.log_softmax(1), teacher.log_softmax(1), log_target=True, reduction="batchmean")

    def _identity(self) -> str:
        sources = [info.sha256 for info in self.pool.infos]
        parts = [self.config.to_dict(), sources, [entry["sha256"] for entry in self.surrogate.manifest["shards"]]]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


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
