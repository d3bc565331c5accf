"""Recycle LoRAs of vision transformers into one meta-LoRA that classifies new tasks without tuning."""

import importlib
from typing import TYPE_CHECKING, Any

from .version import __version__


if TYPE_CHECKING:  # what `_LAZY` loads at run time
    from .adapters.pull import pull_adapter
    from .backbones.backbone import Backbone
    from .distillation.config import DistillationConfig
    from .distillation.saving import save_meta_lora, wrap_student
    from .distillation.trainer import MetaLoraTrainer
    from .errors import AdapterError, ConfigError, DataError, LoraRecycleError, PushError
    from .evaluation.evaluate import evaluate
    from .finetuning.config import TaskTuningConfig
    from .inversion.config import InversionConfig
    from .inversion.inverter import LoraInverter
    from .modeling.export import export
    from .modeling.head_fitting import fit_head
    from .modeling.meta_lora import MetaLoRAForFewShotClassification
    from .modeling.pipeline import FewShotImageClassificationPipeline
    from .pool.config import TuningConfig
    from .pool.pool import AdapterPool
    from .pool.training import tune_pool
    from .surrogate.dataset import SurrogateDataset


#: Loaded on first use, so that importing the package stays quick.
_LAZY = {
    "AdapterError": "errors",
    "AdapterPool": "pool.pool",
    "Backbone": "backbones.backbone",
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
    "SurrogateDataset": "surrogate.dataset",
    "TaskTuningConfig": "finetuning.config",
    "TuningConfig": "pool.config",
    "evaluate": "evaluation.evaluate",
    "export": "modeling.export",
    "fit_head": "modeling.head_fitting",
    "pull_adapter": "adapters.pull",
    "save_meta_lora": "distillation.saving",
    "tune_pool": "pool.training",
    "wrap_student": "distillation.saving",
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
