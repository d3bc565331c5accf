"""Settings of LoRA inversion."""

from __future__ import annotations

import dataclasses

from ..runtime.config import RecipeConfig, field, require_choices


STARTS = ("noise", "dead-leaves", "pale-leaves", "fractal", "strokes", "images")
PRIORS = ("tv", "patch_entropy", "batch_norm")


@dataclasses.dataclass
class InversionConfig(RecipeConfig):
    """How the surrogate images of each adapter are made (stage 1 of LoRA Recycle)."""

    images_per_class: int = field(6, "surrogate images of each class")
    max_classes: int | None = field(10, "classes of one adapter that are inverted, drawn at random where it has more")
    iterations: int = field(30, "optimisation steps of each image; 0 keeps the starts, labelled by the adapter")
    stop_at: float = field(0.95, "probability of its class at which an image is finished early; 1 stops none")
    lr: float = field(0.05, "step size of Adam")
    batch_size: int = field(64, "images optimised together")
    parameterization: str = field(
        "multires", "multires: sigmoid of a sum of upsampled maps; pixels: the image itself", ("multires", "pixels")
    )
    starts: dict[str, float] = field(
        {"dead-leaves": 0.5, "fractal": 0.25, "strokes": 0.25},
        f"starting images and their shares: {', '.join(STARTS)} (from `start_images`)",
    )
    start_images: str | None = field(None, "folder or parquet file of unlabelled images, or a surrogate folder")
    priors: dict[str, float] = field({"tv": 0.1}, f"image priors and their weights: {', '.join(PRIORS)}")
    hard_weight: float = field(
        0.0, "weight of the term that makes images hard: disagreement of adapter and reference about similarities"
    )
    hard_reference: str = field("average", "who is not to know the images: backbone, average, or a meta-LoRA's folder")
    jitter: int = field(4, "largest random shift of an image at each step, in pixels")
    flip: bool = field(False, "mirror the batch at random steps")
    prune: dict[int, float] = field(
        {}, "layers after which patches are dropped, and the shares of all patches that go on, as in 3=0.5 6=0.25"
    )
    prune_start: int = field(0, "iteration from which on patches are dropped")
    keep_ratio: float = field(
        0.25, "share of the patches in the stored masks, of which meta-training forwards no others; 1 stores none"
    )
    seed: int = field(0, "seed of the starting images, the classes drawn and the jitter")

    def check(self) -> None:
        require_choices(self)
        for name in ("images_per_class", "batch_size"):
            self.require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("iterations", "jitter", "hard_weight", "prune_start"):
            self.require(getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")
        self.require(0 < self.stop_at <= 1, f"stop_at must be in (0, 1], got {self.stop_at}")
        self.require(self.lr > 0, f"lr must be positive, got {self.lr}")
        self.require(
            self.max_classes is None or self.max_classes >= 2, f"max_classes: 2 or more, not {self.max_classes}"
        )
        self._check_pruning()
        for name, known in (("starts", STARTS), ("priors", PRIORS)):
            for key, weight in getattr(self, name).items():
                self.require(key in known, f"{name}: {key!r} is unknown, choose from {', '.join(known)}")
                self.require(weight >= 0, f"{name}: the weight of {key} must not be negative, got {weight}")
        self.require(sum(self.starts.values()) > 0, "starts: at least one share must be positive")
        self.require(
            not self.starts.get("images") or self.start_images is not None, "starts: `images` needs `start_images`"
        )

    def _check_pruning(self) -> None:
        kept = 1.0
        for layer, ratio in sorted(self.prune.items()):
            self.require(layer >= 0, f"prune: layers count from 0, got {layer}")
            self.require(
                0 < ratio < kept, f"prune: shares lie between 0 and 1 and fall from layer to layer, got {self.prune}"
            )
            kept = ratio
        self.require(0 < self.keep_ratio <= 1, f"keep_ratio must be in (0, 1], got {self.keep_ratio}")
