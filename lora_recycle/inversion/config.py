"""Settings of LoRA inversion."""

from __future__ import annotations

import dataclasses

from ..configuration import RecipeConfig, field, require_choices


STARTS = ("noise", "dead-leaves", "fractal", "strokes", "images")
PRIORS = ("tv", "patch_entropy", "batch_norm")


@dataclasses.dataclass
class InversionConfig(RecipeConfig):
    """How the surrogate images of each adapter are made (stage 1 of LoRA Recycle)."""

    images_per_class: int = field(8, "surrogate images of each class")
    max_classes: int | None = field(20, "classes of one adapter that are inverted, drawn at random where it has more")
    iterations: int = field(30, "optimisation steps of each image; 0 keeps the starts, labelled by the adapter")
    lr: float = field(0.05, "step size of Adam")
    batch_size: int = field(64, "images optimised together")
    parameterization: str = field(
        "multires", "multires: sigmoid of a sum of upsampled maps; pixels: the image itself", ("multires", "pixels")
    )
    starts: dict[str, float] = field(
        {"dead-leaves": 1.0},
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
    keep_ratio: float = field(1.0, "share of the patches kept by token pruning; the kept positions become the mask")
    prune_layer: int | None = field(None, "layer after which patches are dropped; the middle one by default")
    seed: int = field(0, "seed of the starting images, the classes drawn and the jitter")

    def check(self) -> None:
        require_choices(self)
        for name in ("images_per_class", "batch_size"):
            self.require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("iterations", "jitter", "hard_weight"):
            self.require(getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")
        self.require(self.lr > 0, f"lr must be positive, got {self.lr}")
        self.require(
            self.max_classes is None or self.max_classes >= 2, f"max_classes: 2 or more, not {self.max_classes}"
        )
        self.require(0 < self.keep_ratio <= 1, f"keep_ratio must be in (0, 1], got {self.keep_ratio}")
        for name, known in (("starts", STARTS), ("priors", PRIORS)):
            for key, weight in getattr(self, name).items():
                self.require(key in known, f"{name}: {key!r} is unknown, choose from {', '.join(known)}")
                self.require(weight >= 0, f"{name}: the weight of {key} must not be negative, got {weight}")
        self.require(sum(self.starts.values()) > 0, "starts: at least one share must be positive")
        self.require(
            not self.starts.get("images") or self.start_images is not None, "starts: `images` needs `start_images`"
        )
