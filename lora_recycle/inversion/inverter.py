"""LoRA inversion: images that the frozen backbone + adapter + head classify as intended (stage 1, Eq. 1)."""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ..adapters.adapter import Adapter
from ..adapters.pull import AdapterInfo
from ..backbones.backbone import Backbone
from ..backbones.token_selection import num_kept, select_top
from ..errors import ConfigError, DivergenceError
from ..pool.pool import AdapterPool
from ..runtime.files import file_sha256, tensors_sha256
from ..runtime.heartbeat import Heartbeat, beat
from ..runtime.launch import claim_indices, mixed_precision, process_state
from ..runtime.run_lock import only_run_in
from ..surrogate.dataset import OUTPUT, Shard, SurrogateDataset, save_shard, write_manifest
from ..version import __version__
from .batch import InversionBatch, Objective
from .batch_norm import LITE0
from .config import InversionConfig
from .priors import build_priors
from .resume import is_finished, refuse_other_recipe, start_over
from .starts import draw_starts


class LoRAInverter:
    """Makes the surrogate images of every adapter of a pool.

    Args:
        pool ([`AdapterPool`]): the adapters, each with a head.
        config ([`InversionConfig`]): how.

    Raises:
        AdapterError: an adapter has no head, or one that does not fit; raised before any inversion starts.
    """

    def __init__(self, pool: AdapterPool, config: InversionConfig | dict[str, Any] | None = None):
        self.pool, self.config = pool, InversionConfig.of(config)
        self.backbone = pool.backbone
        pool.require_heads()
        self.mask_layer = _mask_layer(self.config, self.backbone)
        self.prior = build_priors(self.config, self.backbone)
        self.stock = _load_stock(self.config, self.backbone) if self.config.start_images else None
        self.accelerator = mixed_precision()
        #: mean loss of each iteration of the last adapter, for curves, and its images' iterations in all
        self.losses: list[float] = []
        self.image_iterations = 0
        #: name, SHA-256 and reason of the adapters that `run` could not invert
        self.failed: list[dict[str, str]] = []

    def run(
        self,
        output_dir: str | Path,
        *,
        progress: bool = True,
        on_shard: Callable[[str, Shard], None] | None = None,
        resume: bool = True,
    ) -> SurrogateDataset:
        """Write one shard for each adapter and the manifest.

        Finished shards of an earlier run are kept, damaged ones made again; with `resume=False` all that is there is
        deleted first. Several processes (`accelerate launch`) share the adapters, each going to the process that is
        free first; the bytes do not depend on who made what. An adapter whose images diverge is left out, and listed
        in `failed` and in the manifest.

        Raises:
            ConfigError: `output_dir` holds shards of another recipe.
            DivergenceError: all adapters diverge.
            ProcessError: another process fell silent.
            StorageError: another run is at work in `output_dir`, it holds something else than surrogate data, or
                nothing can be written there.
        """
        state, output_dir = process_state(), Path(output_dir)
        with only_run_in(output_dir, OUTPUT, needed=state.is_main_process):
            if state.is_main_process and resume:
                self.check_folder(output_dir)
            elif state.is_main_process:
                start_over(output_dir, _shard_names(self.pool))
            state.wait_for_everyone()
            self._run(output_dir, progress, on_shard)
        return SurrogateDataset.from_pretrained(output_dir)

    def check_folder(self, output_dir: str | Path) -> None:
        """Raise `ConfigError` where the folder holds shards of another recipe, which `run` would not go on with."""
        identities = map(self._identity, self.pool.infos)
        named = dict(zip(_shard_names(self.pool), identities, strict=True))
        refuse_other_recipe(Path(output_dir), named, self.config.to_dict())

    def unfinished(self, output_dir: str | Path) -> list[int]:
        """The adapters whose shards `run` would make: missing ones and damaged ones."""
        names, infos = _shard_names(self.pool), self.pool.infos
        folder = Path(output_dir) / "shards"
        return [i for i, name in enumerate(names) if not is_finished(folder / name, self._identity(infos[i]))]

    def _run(self, output_dir: Path, progress: bool, on_shard: Callable[[str, Shard], None] | None) -> None:
        state, names = process_state(), _shard_names(self.pool)
        lost: list[tuple[int, dict[str, str]]] = []
        bar = tqdm(total=len(names), desc="invert", unit="adapter", disable=not (progress and state.is_main_process))
        with bar, Heartbeat("invert") as heart:
            for i in claim_indices(len(names)):
                bar.update(i - bar.n)  # those before it were dealt too
                try:
                    self._write_shard(i, output_dir / "shards" / names[i], bar, on_shard)
                except DivergenceError as error:
                    info = self.pool.infos[i]
                    lost.append((i, {"name": info.name, "sha256": info.sha256, "reason": str(error)}))
            heart.wait_for_all()
            bar.update(len(names) - bar.n)
            failed = dict(sorted(gather_object(lost), key=lambda entry: entry[0]))
            self.failed = list(failed.values())
            if len(failed) == len(names):
                raise DivergenceError(self.failed[0]["reason"])
            if state.is_main_process:
                files = [output_dir / "shards" / name for i, name in enumerate(names) if i not in failed]
                write_manifest(output_dir, self._header() | ({"failed": self.failed} if failed else {}), files)
            heart.wait_for_all()

    def _write_shard(self, index: int, path: Path, bar: tqdm, on_shard: Callable[[str, Shard], None] | None) -> None:
        info, started = self.pool.infos[index], time.perf_counter()
        identity = self._identity(info)
        if is_finished(path, identity):
            return
        beat(f"adapter {info.name}")
        shard = self.invert(index)
        save_shard(path, shard, identity)
        steps = self.image_iterations / (time.perf_counter() - started)
        bar.set_postfix(accuracy=f"{shard.accuracy:.2f}", image_iterations_per_s=f"{steps:.0f}")
        if on_shard is not None:
            on_shard(path.name, shard)

    def invert(self, index: int) -> Shard:
        """The surrogate images of one adapter, with its logits and features on the stored pixels.

        Raises:
            DivergenceError: the loss of a batch, or what the adapter says of the images, is not finite.
        """
        adapter = self.pool[index]
        seed = int(hashlib.sha256(f"{self.config.seed}/{adapter.info.sha256}".encode()).hexdigest()[:15], 16)
        generator = torch.Generator().manual_seed(seed)
        classes = torch.randperm(adapter.num_classes, generator=generator)[: self.config.max_classes].sort().values
        labels = classes.repeat_interleave(self.config.images_per_class)
        labels = labels[torch.randperm(len(labels), generator=generator)]  # batches mix the classes
        starts = draw_starts(self.config.starts, len(labels), self.backbone.image_size, generator, self.stock)
        with self.pool.folded(index):
            pixels = self._optimise(index, starts, labels, generator)
            logits, features, kept = self.describe(adapter, pixels)
        if not (logits.isfinite().all() and features.isfinite().all()):
            self._diverged(index, "its logits or features (in float16) of the finished images are not finite")
        if self.config.iterations == 0:
            labels = logits.argmax(1)
        return Shard(_source(adapter), pixels, labels, logits, features, kept)

    def _optimise(
        self, index: int, starts: torch.Tensor, labels: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        """Optimise images batch by batch: (N, 3, S, S) in [0, 1] to uint8 of the same shape."""
        pixels = (starts * 255).round().to(torch.uint8)
        iterations = self.config.iterations
        if iterations == 0:  # the starts themselves, not what the parameterisation makes of them
            self.losses, self.image_iterations = [], 0
            return pixels
        losses, images = torch.zeros(iterations, device=self.backbone.device), [0] * iterations
        for rows in torch.arange(len(labels)).split(self.config.batch_size):
            batch = self.batch(index, starts[rows], labels[rows], generator)
            while len(rows):
                step = batch.iteration
                beat(f"adapter {self.pool.infos[index].name}, iteration {step}")
                losses[step] += len(rows) * batch.step()  # stays on the device until the end
                images[step] += len(rows)
                finished = batch.finished()
                if finished.any():
                    pixels[rows[finished]] = batch.pixels()[finished]
                    rows = rows[~finished]
                    batch.keep(~finished)
            if not losses.isfinite().all():  # one look for each batch: it waits for the device
                step = int(losses.isfinite().logical_not().nonzero()[0])
                self._diverged(index, f"the loss of its images is not finite from iteration {step} on")
        self.losses = [total / count for total, count in zip(losses.tolist(), images, strict=True) if count]
        self.image_iterations = sum(images)
        return pixels

    def _diverged(self, index: int, what: str) -> None:
        raise DivergenceError(
            f"{self.pool.infos[index].where}: {what}. Lower `lr` (now {self.config.lr}) or the weights of the priors, "
            "or look whether the adapter itself gives NaN."
        )

    def batch(
        self, index: int, starts: torch.Tensor, labels: torch.Tensor, generator: torch.Generator
    ) -> InversionBatch:
        """Images of adapter `index` under optimisation; to be stepped while the adapter is folded in.

            with pool.folded(0):
                batch = inverter.batch(0, starts, labels, torch.Generator().manual_seed(0))
                for _ in range(30):
                    batch.step()
                pixels = batch.pixels()

        Args:
            starts: float (B, 3, S, S) in [0, 1].
            labels: int64 (B,), classes of the adapter's head.
            generator: on the CPU, draws the jitter.
        """
        parts = (self.backbone, self.pool[index], self.config, self.prior, self.accelerator)
        return InversionBatch(Objective(*parts), starts, labels, generator)

    @torch.inference_mode()
    def describe(
        self, adapter: Adapter, pixels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Teacher logits, teacher features and kept tokens on the stored pixels, all tokens forwarded."""
        logits, features, kept = [], [], []
        for part in pixels.split(128):
            with self.backbone.record_attention(self.mask_layer) as attention:
                hidden, _ = self.backbone(self.backbone.normalize(part))
            logits.append(adapter.logits(self.backbone, hidden).float().cpu())
            features.append(self.backbone.pool_features(hidden).half().cpu())
            if self.config.keep_ratio < 1:
                k = num_kept(self.backbone.num_patches, self.config.keep_ratio)
                scores = attention.row[:, self.backbone.num_prefix_tokens :]
                kept.append(select_top(scores, k).to(torch.int16).cpu())
        return torch.cat(logits), torch.cat(features), torch.cat(kept) if kept else None

    def _identity(self, info: AdapterInfo) -> str:
        """What a shard depends on: the settings, the adapter's bytes and the backbone."""
        parts: list[Any] = [self.config.to_dict(), info.sha256, self.backbone.name, self.backbone.revision]
        if info.prompt:  # the head is made of these, not of the adapter's bytes
            parts.append([info.prompt, info.labels])
        if info.support:
            parts.append(info.support)
        if self.accelerator.mixed_precision != "no":
            parts.append(self.accelerator.mixed_precision)
        if self.backbone.dtype != torch.float32:
            parts.append(str(self.backbone.dtype))
        if self.data_sha256:
            parts.append(self.data_sha256)
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    @functools.cached_property
    def data_sha256(self) -> dict[str, str]:
        """Checksums of what the settings name by its path: the starting images, and a CNN."""
        found = {} if self.stock is None else {"start_images": tensors_sha256({"pixels": self.stock})}
        if self.config.priors.get("batch_norm") and self.config.cnn != LITE0:
            found["cnn"] = file_sha256(Path(self.config.cnn))
        return found

    def _header(self) -> dict:
        return {
            "lora_recycle_version": __version__,
            "backbone": {"name": self.backbone.name, "revision": self.backbone.revision},
            "image_processor": self.backbone.processor_settings(),
            "config": self.config.to_dict(),
            "data_sha256": self.data_sha256,
            "precision": [str(self.backbone.dtype), self.accelerator.mixed_precision],
        }


def _source(adapter: Adapter) -> dict:
    info = adapter.info
    return {
        **info.to_source(),
        "labels": list(info.labels) if info.labels else None,
        "num_classes": adapter.num_classes,
        **({"prompt": info.prompt} if info.prompt else {}),
        **({"support_sha256": info.support} if info.support else {}),
    }


def _shard_names(pool: AdapterPool) -> list[str]:
    return [f"{i:04d}-{info.name.replace('/', '--')}.safetensors" for i, info in enumerate(pool.infos)]


def _mask_layer(config: InversionConfig, backbone: Backbone) -> int:
    """The layer whose attention chooses the stored masks: the last one that prunes, or the middle one."""
    layers = len(backbone.layers)
    for layer in config.prune:
        if layer >= layers:
            raise ConfigError(f"prune: {backbone.name} has the layers 0 to {layers - 1}, got {layer}")
    return max(config.prune, default=layers // 2)


def _load_stock(config: InversionConfig, backbone: Backbone) -> torch.Tensor:
    """The images that the share `images` starts from: uint8 (M, 3, S, S)."""
    from ..images.labelled import load_unlabelled_images

    assert config.start_images is not None  # or there would be no share `images`
    path = Path(config.start_images)
    if (path / "manifest.json").is_file():
        surrogate = SurrogateDataset.from_pretrained(path)
        return torch.cat([surrogate.shard(i).pixels for i in range(surrogate.num_shards)])
    return load_unlabelled_images(path, backbone.image_size, int(backbone.processor.resample), seed=config.seed)
