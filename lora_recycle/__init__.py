"""Recycle LoRAs of vision transformers into one meta-LoRA that classifies new tasks without tuning."""

import importlib
from typing import TYPE_CHECKING, Any

from .version import __version__


if TYPE_CHECKING:  # what `_LAZY` loads at run time
    from .adapters.pull import pull_adapter
    from .backbones.backbone import Backbone
    from .distillation.config import DistillationConfig
    from .distillation.plan import plan_distillation
    from .distillation.saving import save_meta_lora
    from .distillation.trainer import MetaLoRATrainer
    from .errors import AdapterError, ConfigError, DataError, LoRARecycleError, PushError
    from .evaluation.config import EvaluationConfig
    from .evaluation.evaluate import evaluate
    from .finetuning.config import TaskTuningConfig
    from .inversion.config import InversionConfig
    from .inversion.inverter import LoRAInverter
    from .inversion.plan import plan_inversion
    from .modeling.export import export
    from .modeling.head_fitting import fit_head
    from .modeling.meta_lora import MetaLoRAForFewShotClassification
    from .modeling.pipeline import FewShotImageClassificationPipeline
    from .pool.config import AdapterTrainingConfig
    from .pool.extraction import extract
    from .pool.pool import AdapterPool
    from .pool.training import train_adapters
    from .surrogate.dataset import SurrogateDataset


#: Loaded on first use, so that importing the package stays quick.
_LAZY = {
    "AdapterError": "errors",
    "AdapterPool": "pool.pool",
    "Backbone": "backbones.backbone",
    "ConfigError": "errors",
    "DataError": "errors",
    "DistillationConfig": "distillation.config",
    "EvaluationConfig": "evaluation.config",
    "FewShotImageClassificationPipeline": "modeling.pipeline",
    "InversionConfig": "inversion.config",
    "LoRAInverter": "inversion.inverter",
    "LoRARecycleError": "errors",
    "MetaLoRAForFewShotClassification": "modeling.meta_lora",
    "MetaLoRATrainer": "distillation.trainer",
    "PushError": "errors",
    "SurrogateDataset": "surrogate.dataset",
    "TaskTuningConfig": "finetuning.config",
    "AdapterTrainingConfig": "pool.config",
    "evaluate": "evaluation.evaluate",
    "export": "modeling.export",
    "extract": "pool.extraction",
    "fit_head": "modeling.head_fitting",
    "plan_distillation": "distillation.plan",
    "plan_inversion": "inversion.plan",
    "pull_adapter": "adapters.pull",
    "save_meta_lora": "distillation.saving",
    "train_adapters": "pool.training",
}

__all__ = [
    "AdapterError",
    "AdapterPool",
    "AdapterTrainingConfig",
    "Backbone",
    "ConfigError",
    "DataError",
    "DistillationConfig",
    "EvaluationConfig",
    "FewShotImageClassificationPipeline",
    "InversionConfig",
    "LoRAInverter",
    "LoRARecycleError",
    "MetaLoRAForFewShotClassification",
    "MetaLoRATrainer",
    "PushError",
    "SurrogateDataset",
    "TaskTuningConfig",
    "__version__",
    "evaluate",
    "export",
    "extract",
    "fit_head",
    "plan_distillation",
    "plan_inversion",
    "pull_adapter",
    "save_meta_lora",
    "train_adapters",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
