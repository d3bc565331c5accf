"""Settings of LoRA inversion."""

from __future__ import annotations

import dataclasses

from ..runtime.config import RecipeConfig, field, require_choices


STARTS = ("noise", "dead-leaves", "pale-leaves", "fractal", "strokes", "images")
PRIORS = ("tv", "patch_entropy", "batch_norm")


@dataclasses.dataclass
class InversionConfig(RecipeConfig):
    """How the surrogate images of each adapter are made (stage 1 of LoRA Recycle)."""

    retired = {"hard_weight": (0.0,), "hard_reference": None}

    images_per_class: int = field(6, "surrogate images per class")
    max_classes: int | None = field(
        10, "largest number of classes to invert per adapter, sampled if it has more; none: all"
    )
    iterations: int = field(30, "optimisation steps per image; 0 keeps the starting images, labelled by the adapter")
    stop_at: float = field(0.95, "stop an image early when its class reaches this probability; 1: never")
    lr: float = field(0.05, "learning rate of Adam; for pixels in units of the backbone's standard deviation")
    batch_size: int = field(64, "images per batch")
    parameterization: str = field(
        "multires",
        "multires: sigmoid of a sum of upsampled maps; pixels: normalised pixels, cut to their range after each step",
        ("multires", "pixels"),
    )
    starts: dict[str, float] = field(
        {"dead-leaves": 0.5, "fractal": 0.25, "strokes": 0.25},
        f"starting images and their fractions: {', '.join(STARTS)} (from `start_images`)",
    )
    start_images: str | None = field(None, "folder or parquet file of unlabelled images, or a surrogate folder")
    priors: dict[str, float] = field({"tv": 0.1}, f"image priors and their weights: {', '.join(PRIORS)}")
    cnn: str = field(
        "efficientnet-lite0",
        "CNN of the prior batch_norm: efficientnet-lite0 (extra [cnn]), or a safetensors file of a ResNet-50",
    )
    jitter: int = field(4, "largest random shift per step, in pixels")
    flip: bool = field(False, "mirror the batch in random steps")
    prune: dict[int, float] = field(
        {}, "layers after which patches are dropped, with the fraction of all patches kept, as in 3=0.5 6=0.25"
    )
    prune_start: int = field(0, "first iteration in which patches are dropped")
    keep_ratio: float = field(
        0.25, "fraction of patches in the stored masks; distillation forwards only these; 1: no masks"
    )
    seed: int = field(0, "seed of the starting images, the sampled classes and the jitter")

    def check(self) -> None:
        require_choices(self)
        for name in ("images_per_class", "batch_size"):
            self.require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("iterations", "jitter", "prune_start"):
            self.require(getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")
        self.require(0 < self.stop_at <= 1, f"stop_at must be in (0, 1], got {self.stop_at}")
        self.require(self.lr > 0, f"lr must be positive, got {self.lr}")
        self.require(
            self.max_classes is None or self.max_classes >= 2,
            f"max_classes must be at least 2, got {self.max_classes}",
        )
        self._check_pruning()
        for name, known in (("starts", STARTS), ("priors", PRIORS)):
            for key, weight in getattr(self, name).items():
                self.require(key in known, f"{name}: {key!r} is unknown; choose from {', '.join(known)}")
                self.require(weight >= 0, f"{name}: the weight of {key} must not be negative, got {weight}")
        self.require(sum(self.starts.values()) > 0, "starts: at least one fraction must be positive")
        self.require(
            not self.starts.get("images") or self.start_images is not None, "starts: `images` needs `start_images`"
        )

    def _check_pruning(self) -> None:
        kept = 1.0
        for layer, ratio in sorted(self.prune.items()):
            self.require(layer >= 0, f"prune: layers are numbered from 0, got {layer}")
            self.require(
                0 < ratio < kept,
                f"prune: fractions must be between 0 and 1 and decrease from layer to layer, got {self.prune}",
            )
            kept = ratio
        self.require(0 < self.keep_ratio <= 1, f"keep_ratio must be in (0, 1], got {self.keep_ratio}")
