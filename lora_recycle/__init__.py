"""Recycle LoRAs of vision transformers into one meta-LoRA that classifies new tasks without tuning."""

import importlib
from typing import Any

from .version import __version__


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

__all__ = [  # noqa: F822 - loaded on first use, so that importing the package stays quick
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
