"""Settings of `train-adapters`, apart from the work itself so that the command line's help needs no torch."""

from __future__ import annotations

import dataclasses

from ..runtime.config import RecipeConfig, field, require_choices


@dataclasses.dataclass
class AdapterTrainingConfig(RecipeConfig):
    """How `train-adapters` trains its adapters."""

    tasks: int = field(10, "adapters to train, each on its own sample of classes")
    classes: int = field(10, "classes per task")
    images_per_class: int = field(200, "training images per class; fewer if the data set has fewer")
    validation_images: int = field(20, "validation images per class, at most a fifth of the class")
    epochs: int = field(4, "epochs over the training images")
    lr: float = field(2e-3, "peak learning rate of AdamW, with 5% warm-up and cosine decay")
    batch_size: int = field(16, "images per step")
    peft_type: str = field("LORA", "adapter type", ("LORA", "DORA", "LOHA", "LOKR"))
    rank: int = field(8, "rank of the adapter")
    targets: str = field("all", "linear layers to adapt: all, or comma-separated leaf names, as in q_proj,v_proj")
    keep_ratio: float = field(0.5, "fraction of each image's patches that is used before the last epoch, for speed")
    flip: bool = field(True, "mirror half of the images; turn off where left and right matter")
    seed: int = field(0, "seed of the sampled classes, the order and the initial weights")

    def check(self) -> None:
        require_choices(self)
        for name in ("tasks", "classes", "images_per_class", "epochs", "batch_size", "rank"):
            self.require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        self.require(self.classes >= 2, f"classes must be at least 2, got {self.classes}")
        self.require(0 < self.keep_ratio <= 1, f"keep_ratio must be in (0, 1], got {self.keep_ratio}")
