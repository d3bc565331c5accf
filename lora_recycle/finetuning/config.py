"""Settings of tuning on one task's support images."""

from __future__ import annotations

import dataclasses

from ..runtime.config import RecipeConfig, field, require_choices


@dataclasses.dataclass
class TaskTuningConfig(RecipeConfig):
    """How a network and its class centres learn from a support set."""

    steps: int = field(20, "steps of Adam on all support images at once; 0 tunes nothing")
    lr: float = field(1e-3, "first step size for the network, falling to zero along a cosine")
    head_lr: float = field(0.05, "the same for the class centres, in units of their own size")
    last_layers: int | None = field(
        2, "only so many last layers learn, what enters them is computed once; none: all layers learn"
    )
    consistency: float = field(0.0, "weight of the term that holds embeddings to those of the untuned network")
    leave_one_out: bool = field(
        False, "score each image by centres made without it; these stay means, and head_lr has no meaning"
    )
    metric: str = field("cosine", "distance of images to class centres", ("cosine", "euclidean"))
    temperature: float = field(
        0.03, "divisor of the (negative) distances; where it is small, images that are right already teach little"
    )
    seed: int = field(0, "seed of random initial weights and random searches")

    def check(self) -> None:
        require_choices(self)
        self.require(self.steps >= 0, f"steps must not be negative, got {self.steps}")
        self.require(self.last_layers is None or self.last_layers >= 0, f"last_layers: 0 or more: {self.last_layers}")
        for name in ("lr", "head_lr", "consistency"):
            self.require(getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")
        self.require(self.temperature > 0, f"temperature must be positive, got {self.temperature}")
