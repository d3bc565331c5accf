"""From a trained student to a folder that can be published: the model, its sidecar and its card."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from ..distillation.trainer import MetaLoraTrainer
from ..hub.cards import meta_lora_card
from ..hub.embedded import backbone_name
from ..modeling.meta_lora import MetaLoRAForFewShotClassification
from ..pool.pool import AdapterPool
from ..runtime.files import atomic_write, tensors_sha256
from ..runtime.provenance import hardware, versions


def wrap_student(trainer: MetaLoraTrainer) -> MetaLoRAForFewShotClassification:
    """The trainer's student as a model whose sidecar says where it came from."""
    model = trainer.student.to_model(_settings(trainer))
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
    """All that made the student: recipes and seeds, adapters and surrogate data by checksum, versions, machine."""
    manifest = {} if trainer.surrogate is None else trainer.surrogate.manifest
    backbone, state = trainer.pool.backbone, trainer.accelerator
    return {
        "sources": _sources(trainer.pool, manifest),
        "backbone": {
            "name": backbone_name(backbone.name),
            "revision": backbone.revision,
            "sha256": tensors_sha256(backbone.model.state_dict()),
        },
        "distillation": trainer.config.to_dict(),
        "judged": trainer.judged.to_dict(),
        "inversion": copy.deepcopy(manifest.get("config")),
        "inversion_precision": manifest.get("precision"),
        "inversion_data_sha256": manifest.get("data_sha256"),
        "metric": trainer.config.metric,
        "temperature": trainer.config.temperature,
        "versions": versions(),
        "hardware": hardware(backbone.device, state.num_processes, state.mixed_precision),
    }


def _sources(pool: AdapterPool, manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Each adapter with the checksum of its surrogate images, and with the class names that made its head."""
    entries = {entry["adapter"]["sha256"]: entry for entry in manifest.get("shards", ())}
    sources = []
    for info in pool.infos:
        source, entry = info.to_source(), entries.get(info.sha256)
        if entry is not None:
            source["surrogate_sha256"] = entry["sha256"]
            if entry["adapter"].get("prompt"):
                source |= {key: entry["adapter"].get(key) for key in ("prompt", "labels")}
        sources.append(source)
    return sources
