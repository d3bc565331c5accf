"""LoRA inversion: images that the frozen backbone + adapter + head classify as intended (stage 1, Eq. 1)."""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from ..backbones import Backbone
from ..errors import AdapterError, ConfigError
from ..hub.adapters import AdapterInfo
from ..pool import Adapter, AdapterPool
from ..processes import mixed_precision, process_state
from ..relations import relational_divergence
from ..sparsity import num_kept, select_top
from ..surrogate import Shard, SurrogateDataset, save_shard, shard_config_id, write_manifest
from ..version import __version__
from .config import InversionConfig
from .priors import build_priors
from .starts import draw_starts


class MultiResolution(nn.Module):
    """Images as the sigmoid of a sum of maps of 4, 8, ... S pixels, upsampled: coarse structure moves first.

    Args:
        images: float (B, 3, S, S) in [0, 1], where the finest map starts.
    """

    def __init__(self, images: torch.Tensor):
        super().__init__()
        self.size = images.shape[-1]
        sizes = [s for s in (4, 8, 16, 32, 64, 128) if s < self.size]
        shape = (len(images), 3)
        self.maps = nn.ParameterList([nn.Parameter(images.new_zeros(*shape, s, s)) for s in sizes])
        self.maps.append(nn.Parameter(images.clamp(0.02, 0.98).logit()))

    def forward(self) -> torch.Tensor:
        total = self.maps[-1]
        for coarse in self.maps[:-1]:
            total = total + F.interpolate(coarse, size=(self.size,) * 2, mode="bilinear", align_corners=False)
        return total.sigmoid()


class Pixels(nn.Module):
    """The image itself, clipped to the valid range: the paper's own parameterisation."""

    def __init__(self, images: torch.Tensor):
        super().__init__()
        self.images = nn.Parameter(images.clone())

    def forward(self) -> torch.Tensor:
        return self.images + (self.images.clamp(0, 1) - self.images).detach()


class LoraInverter:
    """Makes the surrogate images of every adapter of a pool.

    Args:
        pool ([`AdapterPool`]): the adapters, each with a head.
        config ([`InversionConfig`]): how.
    """

    def __init__(self, pool: AdapterPool, config: InversionConfig | None = None):
        self.pool, self.config = pool, config or InversionConfig()
        self.backbone = pool.backbone
        layers = len(self.backbone.layers)
        self.prune_layer = self.config.prune_layer if self.config.prune_layer is not None else layers // 2
        if not 0 <= self.prune_layer < layers:
            raise ConfigError(f"prune_layer must be in [0, {layers}), got {self.prune_layer}")
        self.prior = build_priors(self.config.priors, self.backbone.num_prefix_tokens)
        self.reference = _reference(pool, self.config) if self.config.hard_weight > 0 else None
        self.stock = _load_stock(self.config, self.backbone) if self.config.start_images else None
        self.accelerator = mixed_precision()
        #: mean loss of each iteration of the last adapter, for curves
        self.losses: list[float] = []

    def run(
        self, output_dir: str | Path, *, progress: bool = True, on_shard: Callable[[str, Shard], None] | None = None
    ) -> SurrogateDataset:
        """Write one shard for each adapter and the manifest. Finished shards of the same settings are kept.

        Several processes (`accelerate launch`) share the adapters; the bytes do not depend on their number.

        Raises:
            AdapterError: an adapter has no head.
        """
        state, output_dir = process_state(), Path(output_dir)
        names = _shard_names(self.pool)
        mine = list(range(state.process_index, len(self.pool), state.num_processes))
        bar = tqdm(mine, desc="invert", unit="adapter", disable=not (progress and state.is_main_process))
        infos = self.pool.infos
        for i in bar:
            path, identity = output_dir / "shards" / names[i], self._identity(infos[i])
            if shard_config_id(path) != identity:
                started = time.perf_counter()
                shard = self.invert(i)
                save_shard(path, shard, identity)
                steps = len(shard) * self.config.iterations / (time.perf_counter() - started)
                bar.set_postfix(accuracy=f"{shard.accuracy:.2f}", image_iterations_per_s=f"{steps:.0f}")
                if on_shard is not None:
                    on_shard(names[i], shard)
        state.wait_for_everyone()
        files = [output_dir / "shards" / name for name in names]
        if state.is_main_process:
            write_manifest(output_dir, self._header(), files)
        state.wait_for_everyone()
        return SurrogateDataset.from_pretrained(output_dir)

    def invert(self, index: int) -> Shard:
        """The surrogate images of one adapter, with its logits and features on the stored pixels."""
        adapter = self.pool[index]
        if adapter.head_weight is None:
            raise AdapterError(f"{adapter.info.name}: has no classification head, so it cannot be inverted.")
        if adapter.head_weight.shape[1] != self.backbone.head_size:
            raise AdapterError(
                f"{adapter.info.name}: its head reads {adapter.head_weight.shape[1]} features, "
                f"{self.backbone.name} gives {self.backbone.head_size}."
            )
        seed = int(hashlib.sha256(f"{self.config.seed}/{adapter.info.sha256}".encode()).hexdigest()[:15], 16)
        generator = torch.Generator().manual_seed(seed)
        classes = torch.randperm(adapter.num_classes, generator=generator)[: self.config.max_classes].sort().values
        labels = classes.repeat_interleave(self.config.images_per_class)
        labels = labels[torch.randperm(len(labels), generator=generator)]  # batches mix the classes
        starts = draw_starts(self.config.starts, len(labels), self.backbone.image_size, generator, self.stock)
        self.losses = [0.0] * self.config.iterations
        with self.pool.folded(index):
            parts = []
            for start in range(0, len(labels), self.config.batch_size):
                part = slice(start, start + self.config.batch_size)
                parts.append(self._optimise(adapter, starts[part], labels[part], generator, len(labels)))
            pixels = torch.cat(parts)
            logits, features, kept = self._describe(adapter, pixels)
        if self.config.iterations == 0:
            labels = logits.argmax(1)
        return Shard(_source(adapter), pixels, labels, logits, features, kept)

    def _optimise(self, adapter: Adapter, starts, labels, generator, total: int) -> torch.Tensor:
        """Optimise one batch: (B, 3, S, S) in [0, 1] to uint8 of the same shape."""
        config, device = self.config, self.backbone.device
        if config.iterations == 0:  # the starts themselves, not what the parameterisation makes of them
            return (starts * 255).round().to(torch.uint8)
        space = MultiResolution if config.parameterization == "multires" else Pixels
        images, labels = space(starts.to(device)), labels.to(device)
        optimizer = torch.optim.Adam(images.parameters(), lr=config.lr, betas=(0.5, 0.99))
        for step in range(config.iterations):
            loss = self._loss(adapter, self._jitter(images(), generator), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            self.losses[step] += loss.item() * len(labels) / total
        with torch.no_grad():
            return (images() * 255).round().to(torch.uint8).cpu()

    def _loss(self, adapter: Adapter, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        pixel_values = self.backbone.normalize(images)
        prune = {self.prune_layer: self.config.keep_ratio} if self.config.keep_ratio < 1 else None
        with self.accelerator.autocast():
            hidden, _ = self.backbone(pixel_values, prune=prune)
        hidden = hidden.float()
        loss = F.cross_entropy(adapter.logits(self.backbone.pool_for_head(hidden)), labels)
        loss = loss + self.prior(images, hidden)
        if self.reference is not None:
            with self.accelerator.autocast():
                other = self.reference.features(pixel_values)
            teacher = self.backbone.pool(hidden)
            loss = loss - self.config.hard_weight * relational_divergence(other, teacher)
        return loss

    def _jitter(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        if self.config.jitter:
            reach = 2 * self.config.jitter + 1
            dy, dx = (torch.randint(0, reach, (2,), generator=generator) - self.config.jitter).tolist()
            images = images.roll((dy, dx), (-2, -1))
        if self.config.flip and torch.rand((), generator=generator) < 0.5:
            images = images.flip(-1)
        return images

    @torch.inference_mode()
    def _describe(self, adapter: Adapter, pixels: torch.Tensor):
        """Teacher logits, teacher features and kept tokens on the stored pixels, all tokens forwarded."""
        logits, features, kept = [], [], []
        for part in pixels.split(128):
            with self.backbone.record_attention(self.prune_layer) as attention:
                hidden, _ = self.backbone(self.backbone.normalize(part))
            logits.append(adapter.logits(self.backbone.pool_for_head(hidden)).float().cpu())
            features.append(self.backbone.pool(hidden).half().cpu())
            if self.config.keep_ratio < 1:
                k = num_kept(self.backbone.num_patches, self.config.keep_ratio)
                scores = attention.row[:, self.backbone.num_prefix_tokens :]
                kept.append(select_top(scores, k).to(torch.int16).cpu())
        return torch.cat(logits), torch.cat(features), torch.cat(kept) if kept else None

    def _identity(self, info: AdapterInfo) -> str:
        """What a shard depends on: the settings, the adapter's bytes and the backbone."""
        parts = [self.config.to_dict(), info.sha256, self.backbone.name, self.backbone.revision]
        if self.config.hard_weight and self.config.hard_reference == "average":
            parts.append([other.sha256 for other in self.pool.infos])
        if self.accelerator.mixed_precision != "no":
            parts.append(self.accelerator.mixed_precision)
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def _header(self) -> dict:
        return {
            "lora_recycle_version": __version__,
            "backbone": {"name": self.backbone.name, "revision": self.backbone.revision},
            "image_processor": self.backbone.processor_settings(),
            "config": self.config.to_dict(),
        }


def _source(adapter: Adapter) -> dict:
    info = adapter.info
    return {
        **info.to_source(),
        "labels": list(info.labels) if info.labels else None,
        "num_classes": adapter.num_classes,
    }


def _shard_names(pool: AdapterPool) -> list[str]:
    return [f"{i:04d}-{info.name.replace('/', '--')}.safetensors" for i, info in enumerate(pool.infos)]


def _reference(pool: AdapterPool, config: InversionConfig) -> Backbone:
    """What the hard images are to be unknown to: the bare backbone, the pool's average, or a meta-LoRA."""
    reference = copy.deepcopy(pool.backbone)
    if config.hard_reference == "backbone":
        return reference
    if config.hard_reference == "average":
        with pool.folded() as averaged:
            return copy.deepcopy(averaged)
    (other,) = AdapterPool.from_pretrained([config.hard_reference], backbone=pool.backbone)
    with pool.folded([other]) as folded:
        return copy.deepcopy(folded)


def _load_stock(config: InversionConfig, backbone: Backbone) -> torch.Tensor:
    """The images that the share `images` starts from: uint8 (M, 3, S, S)."""
    from ..images import load_unlabelled_images

    path = Path(config.start_images)
    if (path / "manifest.json").is_file():
        surrogate = SurrogateDataset.from_pretrained(path)
        return torch.cat([surrogate.shard(i).pixels for i in range(surrogate.num_shards)])
    return load_unlabelled_images(path, backbone.image_size, int(backbone.processor.resample), seed=config.seed)
