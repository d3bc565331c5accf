"""Recycle LoRAs of vision transformers into one meta-LoRA that classifies new tasks without tuning."""

import importlib
from typing import TYPE_CHECKING, Any

from .version import __version__


if TYPE_CHECKING:  # what `_LAZY` loads at run time
    from .backbones import Backbone
    from .distillation.config import DistillationConfig
    from .distillation.trainer import MetaLoraTrainer
    from .errors import AdapterError, ConfigError, DataError, LoraRecycleError, PushError
    from .evaluation.benchmark import evaluate
    from .hub.adapters import pull_adapter
    from .inversion.config import InversionConfig
    from .inversion.inverter import LoraInverter
    from .modeling.export import export
    from .modeling.heads.fitting import fit_head
    from .modeling.meta_lora import MetaLoRAForFewShotClassification
    from .modeling.pipeline import FewShotImageClassificationPipeline
    from .modeling.saving import save_meta_lora, wrap_student
    from .pool import AdapterPool
    from .surrogate import SurrogateDataset
    from .task_tuning.config import TaskTuningConfig
    from .tuning import tune_pool
    from .tuning_config import TuningConfig


#: Loaded on first use, so that importing the package stays quick.
_LAZY = {
    "AdapterError": "errors",
    "AdapterPool": "pool",
    "Backbone": "backbones",
    "ConfigError": "errors",
    "DataError": "errors",
    "DistillationConfig": "distillation.config",
    "FewShotImageClassificationPipeline": "modeling.pipeline",
    "InversionConfig": "inversion.config",
    "LoraInverter": "inversion.inverter",
    "LoraRecycleError": "errors",
    "MetaLoRAForFewShotClassification": "modeling.meta_lora",
    "MetaLoraTrainer": "distillation.trainer",
    "PushError": "errors",
    "SurrogateDataset": "surrogate",
    "TaskTuningConfig": "task_tuning.config",
    "TuningConfig": "tuning_config",
    "evaluate": "evaluation.benchmark",
    "export": "modeling.export",
    "fit_head": "modeling.heads.fitting",
    "pull_adapter": "hub.adapters",
    "save_meta_lora": "modeling.saving",
    "tune_pool": "tuning",
    "wrap_student": "modeling.saving",
}

__all__ = [
    "AdapterError",
    "AdapterPool",
    "Backbone",
    "ConfigError",
    "DataError",
    "DistillationConfig",
    "FewShotImageClassificationPipeline",
    "InversionConfig",
    "LoraInverter",
    "LoraRecycleError",
    "MetaLoRAForFewShotClassification",
    "MetaLoraTrainer",
    "PushError",
    "SurrogateDataset",
    "TaskTuningConfig",
    "TuningConfig",
    "__version__",
    "evaluate",
    "export",
    "fit_head",
    "pull_adapter",
    "save_meta_lora",
    "tune_pool",
    "wrap_student",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
