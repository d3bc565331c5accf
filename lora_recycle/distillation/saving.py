"""From a trained student to a folder that can be published: the sidecar that says how it was made, and the card."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..hub.embedded import backbone_name
from ..modeling.meta_lora import MetaLoRAForFewShotClassification
from ..modeling.serialization import write_meta_lora
from ..pool.pool import AdapterPool
from ..runtime.files import tensors_sha256
from ..runtime.provenance import hardware, versions
from ..surrogate.dataset import SurrogateDataset
from .config import DistillationConfig
from .selection import CheckpointSelection


def save_meta_lora(model: MetaLoRAForFewShotClassification, folder: str | Path) -> None:
    """Write the adapter, the sidecar and a card. Call it on the main process only."""
    write_meta_lora(model, folder, keep_card=False)


def sidecar_settings(
    pool: AdapterPool,
    surrogate: SurrogateDataset | None,
    config: DistillationConfig,
    selection: CheckpointSelection,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """All that made a student: recipes and seeds, adapters and surrogate data by checksum, versions, machine."""
    manifest = {} if surrogate is None else surrogate.manifest
    backbone = pool.backbone
    return {
        "sources": _sources(pool, manifest),
        "backbone": {
            "name": backbone_name(backbone.name),
            "revision": backbone.revision,
            "sha256": tensors_sha256(backbone.model.state_dict()),
        },
        "distillation": config.to_dict(),
        "judged": selection.to_dict(),
        "inversion": copy.deepcopy(manifest.get("config")),
        "inversion_precision": manifest.get("precision"),
        "inversion_data_sha256": manifest.get("data_sha256"),
        "metric": config.metric,
        "temperature": config.temperature,
        "versions": versions(),
        "hardware": hardware(backbone.device, accelerator.num_processes, accelerator.mixed_precision),
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
