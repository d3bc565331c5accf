"""Settings of `tune-pool`, apart from the work itself so that the command line's help needs no torch."""

from __future__ import annotations

import dataclasses

from ..runtime.config import RecipeConfig, field, require_choices


@dataclasses.dataclass
class TuningConfig(RecipeConfig):
    """How `tune-pool` tunes its adapters."""

    tasks: int = field(10, "adapters to make, each on its own draw of classes")
    classes: int = field(10, "classes of each task")
    images_per_class: int = field(200, "training images of each class, fewer where the set has fewer")
    held_out: int = field(20, "images of each class kept back to measure the adapter, at most a fifth of the class")
    epochs: int = field(4, "passes over the training images")
    lr: float = field(2e-3, "peak step size of AdamW; warm-up of 5 % and cosine decay")
    batch_size: int = field(16, "images of a step")
    peft_type: str = field("LORA", "adapter type", ("LORA", "DORA", "LOHA", "LOKR"))
    rank: int = field(8, "rank of the adapter")
    targets: str = field("all", "which linear layers: all, or leaf names with commas, as in q_proj,v_proj")
    keep_ratio: float = field(0.5, "share of the patches that each image shows before the last epoch (speed)")
    flip: bool = field(True, "mirror half of the images; switch it off where left and right matter")
    seed: int = field(0, "seed of the class draws, the order and the initial weights")

    def check(self) -> None:
        require_choices(self)
        for name in ("tasks", "classes", "images_per_class", "epochs", "batch_size", "rank"):
            self.require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        self.require(self.classes >= 2, f"classes must be at least 2, got {self.classes}")
        self.require(0 < self.keep_ratio <= 1, f"keep_ratio must be in (0, 1], got {self.keep_ratio}")
