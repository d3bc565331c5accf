"""Ways to tune on one task's support set, the baselines of not tuning: peers, one a file, on the base in `base.py`."""

from .base import TaskNetwork, TaskTuning, tune_task
from .config import TaskTuningConfig
from .full import FullTuning
from .learned import LearnedComposition
from .linear import AverageLinear, LinearProbe
from .lora import AverageLoRA, LoRATuning
from .lorahub import LoRAHub
from .mhr import RoutingTuning, TunedAverage


def tuning_methods() -> dict[str, TaskTuning]:
    """The tuning methods that `benchmark` offers, by name, each with its own settings."""
    return {
        "linear-probe": LinearProbe(),
        "full-tuning": FullTuning(),
        "lora-linear": LoRATuning(),
        "average-linear": AverageLinear(),
        "average-lora": AverageLoRA(),
        "learned-composition": LearnedComposition(),
        "mhr-z": RoutingTuning(),
        "mhr-mu": TunedAverage(),
        "lorahub": LoRAHub(),
    }


__all__ = [
    "AverageLinear",
    "AverageLoRA",
    "FullTuning",
    "LearnedComposition",
    "LinearProbe",
    "LoRAHub",
    "LoRATuning",
    "RoutingTuning",
    "TaskNetwork",
    "TaskTuning",
    "TaskTuningConfig",
    "TunedAverage",
    "tune_task",
    "tuning_methods",
]
