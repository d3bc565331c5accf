"""MetaLoraTrainer: surrogate data of many adapters into one meta-LoRA (stage 2)."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors.torch import load_file
from tqdm.auto import tqdm

from ..embedded import backbone_name
from ..errors import ConfigError, DataError
from ..pool import AdapterPool
from ..processes import process_state
from ..prototypes import centre_logits
from ..relations import relational_divergence
from ..storage import atomic_save_tensors, atomic_write
from ..surrogate import SurrogateDataset
from .config import DistillationConfig
from .episodes import EpisodeSampler, SurrogateEpisode, class_identities
from .student import Student
from .teachers import TeacherGroup, match_shards, teach


class MetaLoraTrainer:
    """Distils the surrogate data of a pool into one LoRA.

    Args:
        pool ([`AdapterPool`]): the adapters that the surrogate data came from. They give the initialisation and teach
            the relational loss; their real training data is never needed.
        surrogate ([`SurrogateDataset`], *optional*): from [`LoraInverter`]; not needed where `config.steps` is 0.
        config ([`DistillationConfig`]): how.
    """

    def __init__(
        self, pool: AdapterPool, surrogate: SurrogateDataset | None = None, config: DistillationConfig | None = None
    ):
        self.pool, self.surrogate, self.config = pool, surrogate, config or DistillationConfig()
        if surrogate is None and self.config.steps > 0:
            raise ConfigError("Distillation needs surrogate data; only `steps: 0` goes without.")
        process_state()
        self.accelerator = Accelerator()
        base = backbone_name(pool.backbone.name)
        self.student = Student(pool.backbone, self.config.rank, base, self.config.seed)
        if self.config.init == "average":
            self.student.start_from_average(pool)
        #: loss of every step, by name
        self.history: dict[str, list[float]] = {}

    def train(self, output_dir: str | Path | None = None, *, progress: bool = True) -> Student:
        """Run all steps and return the student. With `output_dir`, checkpoints lie there and a killed run resumes.

        Raises:
            DataError: the surrogate data is of another pool, damaged, or has too few classes for an episode.
        """
        if self.config.steps == 0:
            return self.student
        checkpoint = Path(output_dir) / "checkpoint.safetensors" if output_dir is not None else None
        self._prepare(progress and self.accelerator.is_main_process)
        optimizer = torch.optim.Adam(self.student.trainable(), lr=self.config.lr)
        student, optimizer = self.accelerator.prepare(self.student, optimizer)
        start = self._resume(checkpoint, optimizer)
        bar = tqdm(
            range(start, self.config.steps),
            initial=start,
            total=self.config.steps,
            desc="distill",
            unit="step",
            disable=not (progress and self.accelerator.is_main_process),
        )
        student.train()
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(self.config, step)
            losses = self._losses(student, step)
            loss = sum(losses.values())
            if not torch.isfinite(loss):
                raise DataError(f"The loss is {loss.item()} at step {step}: lower `lr` (now {self.config.lr}).")
            optimizer.zero_grad()
            self.accelerator.backward(loss)
            optimizer.step()
            for name, value in losses.items():
                self.history.setdefault(name, []).append(value.item())
            bar.set_postfix({name: f"{value.item():.3f}" for name, value in losses.items()})
            if checkpoint and ((step + 1) % self.config.checkpoint_every == 0 or step + 1 == self.config.steps):
                self._save_checkpoint(checkpoint, optimizer, step + 1)
        self.student.eval()
        return self.student

    def _prepare(self, progress: bool) -> None:
        """Everything that does not change during training: images in one tensor, targets, the episode sampler."""
        config = self.config
        shards = match_shards(self.pool, self.surrogate)
        self.pixels = torch.cat([shard.pixels for shard in shards])
        masks = [shard.kept_tokens for shard in shards]
        self.kept = torch.cat(masks).long() if config.use_masks and all(m is not None for m in masks) else None
        self.groups: list[TeacherGroup] = []
        predictions = None
        nameless = any(not shard.adapter.get("labels") for shard in shards)
        if config.relational_weight or (config.interpolation_weight and nameless):
            groups = self.pool.groups() if config.groups == "auto" else [list(range(len(self.pool)))]
            found, predictions = teach(self.pool, shards, groups, progress)
            self.groups = [group for group in found if len(group.images) >= 4]
            if config.relational_weight and not self.groups:
                raise DataError("The relational loss needs at least 4 surrogate images in a group of adapters.")
        self.logits = [shard.teacher_logits for shard in shards]
        self.offsets = torch.tensor([0] + [len(shard) for shard in shards]).cumsum(0).tolist()
        self.sampler = None
        if config.kl_weight or config.interpolation_weight:
            identities = class_identities(shards, predictions)
            self.sampler = EpisodeSampler(shards, identities, config.ways, config.shots, config.queries)

    def _losses(self, student: torch.nn.Module, step: int) -> dict[str, torch.Tensor]:
        """All losses of a step from one forward of all its images."""
        config = self.config
        seed = config.seed * 1_000_003 + step * self.accelerator.num_processes + self.accelerator.process_index
        generator = torch.Generator().manual_seed(seed)
        blocks: list[tuple[TeacherGroup, torch.Tensor]] = []
        if config.relational_weight:
            share = max(4, config.relational_batch // len(self.groups))
            for group in self.groups:
                blocks.append((group, torch.randperm(len(group.images), generator=generator)[:share]))
        episodes = []
        for weight, draw in ((config.kl_weight, "single_source"), (config.interpolation_weight, "interpolated")):
            if weight:
                episodes += [getattr(self.sampler, draw)(generator) for _ in range(config.episodes)]
        parts = [group.images[chosen] for group, chosen in blocks]
        parts += [part.flatten() for episode in episodes for part in (episode.support, episode.query)]
        features = list(self._features(student, torch.cat(parts)).split([len(part) for part in parts]))
        losses = {}
        if blocks:
            values = [
                relational_divergence(features.pop(0), group.features[chosen].float().to(self.accelerator.device),
                                      config.similarity_scale)
                for group, chosen in blocks
            ]  # fmt: skip
            losses["relational"] = config.relational_weight * torch.stack(values).mean()
        for episode in episodes:
            name = "kl" if episode.source is not None else "interpolation"
            weight = config.kl_weight if name == "kl" else config.interpolation_weight
            value = self._episode_loss(episode, features.pop(0), features.pop(0)) * weight / config.episodes
            losses[name] = losses.get(name, 0.0) + value
        return losses

    def _features(self, student: torch.nn.Module, index: torch.Tensor) -> torch.Tensor:
        """(B,) image numbers to (B, D); an image that several episodes drew goes through once."""
        unique, inverse = index.unique(return_inverse=True)
        device = self.accelerator.device
        pixel_values = self.student.backbone.normalize(self.pixels[unique].to(device))
        kept = None if self.kept is None else self.kept[unique].to(device)
        return student(pixel_values, kept).float()[inverse.to(device)]

    def _episode_loss(self, episode: SurrogateEpisode, support: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        """KL to the source adapter's head (Eq. 7 of LoRA Recycle, T = 1), or cross-entropy where no teacher fits."""
        config, (ways, queries) = self.config, episode.query.shape
        centres = support.view(ways, -1, support.shape[-1]).mean(1)
        logits = centre_logits(query, centres, config.metric, config.temperature)
        if episode.source is None:
            return F.cross_entropy(logits, torch.arange(ways, device=logits.device).repeat_interleave(queries))
        rows = episode.query.flatten() - self.offsets[episode.source]
        teacher = self.logits[episode.source][rows][:, episode.classes].to(logits.device)
        return F.kl_div(logits.log_softmax(1), teacher.log_softmax(1), log_target=True, reduction="batchmean")

    def _identity(self) -> str:
        sources = [info.sha256 for info in self.pool.infos]
        parts = [self.config.to_dict(), sources, [entry["sha256"] for entry in self.surrogate.manifest["shards"]]]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _save_checkpoint(self, path: Path, optimizer, step: int) -> None:
        """Student and optimiser in one atomic file. Batches depend on seed and step alone, so that is all there is."""
        if not self.accelerator.is_main_process:
            return
        tensors = {}
        for i, parameter in enumerate(self.student.trainable()):
            state = optimizer.state[parameter]
            tensors[f"{i}.value"] = parameter.detach().cpu()
            tensors[f"{i}.exp_avg"] = state["exp_avg"].cpu()
            tensors[f"{i}.exp_avg_sq"] = state["exp_avg_sq"].cpu()
        header = {"step": step, "identity": self._identity(), "history": self.history}
        atomic_save_tensors(path, tensors, json.dumps(header))
        atomic_write(path.with_name("training_log.json"), json.dumps(self.history).encode())

    def _resume(self, path: Path | None, optimizer) -> int:
        """Load a checkpoint of the same recipe and data; return the step to go on with."""
        if path is None or not path.is_file():
            return 0
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                header = json.loads(file.metadata()["header"])
            tensors = load_file(path)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}: the checkpoint is damaged ({error}). Delete it to start again.") from error
        if header["identity"] != self._identity():
            raise ConfigError(
                f"{path} is a checkpoint of another recipe, pool or surrogate data. Choose another output folder, "
                "or delete it to start again."
            )
        step = header["step"]
        for i, parameter in enumerate(self.student.trainable()):
            parameter.data.copy_(tensors[f"{i}.value"])
            optimizer.state[parameter] = {
                "step": torch.tensor(float(step)),
                "exp_avg": tensors[f"{i}.exp_avg"].to(parameter.device),
                "exp_avg_sq": tensors[f"{i}.exp_avg_sq"].to(parameter.device),
            }
        self.history = header["history"]
        return step


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
