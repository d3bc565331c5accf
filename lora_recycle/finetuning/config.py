"""Settings of tuning on one task's support images."""

from __future__ import annotations

import dataclasses

from ..runtime.config import RecipeConfig, field, require_choices


@dataclasses.dataclass
class TaskTuningConfig(RecipeConfig):
    """How a network and its prototypes learn from a support set."""

    steps: int = field(20, "steps of Adam on the whole support set; 0: no tuning")
    lr: float = field(1e-3, "initial learning rate of the network, with cosine decay to zero")
    head_lr: float = field(0.05, "the same for the prototypes, relative to their norm")
    last_layers: int | None = field(
        2,
        "number of last layers that learn; the activations that enter them are computed once; none: all layers learn",
    )
    consistency: float = field(0.0, "weight of the term that keeps embeddings close to those of the untuned network")
    leave_one_out: bool = field(
        False, "score each image by prototypes computed without it; prototypes then stay means, and head_lr is ignored"
    )
    metric: str = field("cosine", "metric between images and prototypes", ("cosine", "euclidean"))
    temperature: float = field(
        0.03, "divisor of the (negative) distances; the smaller, the less already correct images contribute"
    )
    seed: int = field(0, "seed of random initial weights and random search")

    def check(self) -> None:
        require_choices(self)
        self.require(self.steps >= 0, f"steps must not be negative, got {self.steps}")
        self.require(
            self.last_layers is None or self.last_layers >= 0,
            f"last_layers must not be negative, got {self.last_layers}",
        )
        for name in ("lr", "head_lr", "consistency"):
            self.require(getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")
        self.require(self.temperature > 0, f"temperature must be positive, got {self.temperature}")
