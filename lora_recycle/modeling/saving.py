"""From a trained student to a folder that can be published: the model, its sidecar and its card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from ..distillation.trainer import MetaLoraTrainer
from ..hub.cards import meta_lora_card
from ..storage import atomic_write
from ..version import __version__
from .meta_lora import MetaLoRAForFewShotClassification


def wrap_student(trainer: MetaLoraTrainer) -> MetaLoRAForFewShotClassification:
    """The trainer's student as a model whose sidecar says where it came from."""
    model = MetaLoRAForFewShotClassification.from_student(trainer.student, _settings(trainer))
    if trainer.surrogate is not None:
        model.picture = trainer.surrogate.picture()
    return model


def save_meta_lora(model: MetaLoRAForFewShotClassification, folder: str | Path) -> None:
    """Write the adapter, the sidecar and a card. Call it on the main process only."""
    folder = Path(folder)
    model.save_pretrained(folder)
    config = model.peft_model.peft_config["default"]
    base, picture = config.base_model_name_or_path, model.picture is not None
    card = meta_lora_card(folder.name, base, config.revision, getattr(config, "r", None), model.settings, picture)
    atomic_write(folder / "README.md", card.encode())


def _settings(trainer: MetaLoraTrainer) -> dict[str, Any]:
    return {
        "sources": [info.to_source() for info in trainer.pool.infos],
        "distillation": trainer.config.to_dict(),
        "inversion": None if trainer.surrogate is None else trainer.surrogate.manifest["config"],
        "metric": trainer.config.metric,
        "temperature": trainer.config.temperature,
        "versions": {
            "lora_recycle": __version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            "peft": peft.__version__,
        },
    }
