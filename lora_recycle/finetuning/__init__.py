"""Ways to tune on one task's support set, the rivals of not tuning: peers, one a file, on the base in `base.py`."""

from .base import TaskNetwork, TaskTuning, tune_task
from .config import TaskTuningConfig
from .full import FullTuning
from .learned import LearnedComposition
from .linear import AverageLinear, LinearProbe
from .lora import AverageLora, LoraTuning
from .lorahub import LoraHub


def tuning_methods() -> dict[str, TaskTuning]:
    """The tuning methods that `benchmark` offers, by name, each with its own settings."""
    return {
        "linear-probe": LinearProbe(),
        "full-tuning": FullTuning(),
        "lora-linear": LoraTuning(),
        "average-linear": AverageLinear(),
        "average-lora": AverageLora(),
        "learned-composition": LearnedComposition(),
        "lorahub": LoraHub(),
    }


__all__ = [
    "AverageLinear",
    "AverageLora",
    "FullTuning",
    "LearnedComposition",
    "LinearProbe",
    "LoraHub",
    "LoraTuning",
    "TaskNetwork",
    "TaskTuning",
    "TaskTuningConfig",
    "tune_task",
    "tuning_methods",
]
