"""A LoRA tuned on each task, from nothing or from the pool's average."""

from __future__ import annotations

from ..distillation.student import Student
from ..embedded import backbone_name
from ..pool import AdapterPool
from .base import TaskNetwork, TaskTuning
from .config import TaskTuningConfig


class LoraTuning(TaskTuning):
    """A new LoRA on all linear layers and the class centres ("LoRA + Linear" in LoRA Recycle's tables).

    Args:
        rank (`int`, *optional*, defaults to 8): of the LoRA.
    """

    start = "zero"

    def __init__(self, config: TaskTuningConfig | None = None, rank: int = 8):
        super().__init__(config)
        self.rank = rank

    def network(self, pool: AdapterPool) -> TaskNetwork:
        last, depth = self.config.last_layers, len(pool.backbone.layers)
        first = 0 if last is None else min(max(0, depth - last), depth - 1)
        student = Student(pool.backbone, self.rank, backbone_name(pool.backbone.name), self.config.seed, first)
        if self.start == "average":
            student.start_from_average(pool)
        return TaskNetwork(student.backbone, student.trainable(), depth - first)


class AverageLora(LoraTuning):
    """The same from the pool's average, cut to the rank: PVP (arXiv 2304.13639) with the adapter that takes seconds.

    Args:
        rank (`int`, *optional*, defaults to 16): of the LoRA.
    """

    start = "average"

    def __init__(self, config: TaskTuningConfig | None = None, rank: int = 16):
        super().__init__(config, rank)
