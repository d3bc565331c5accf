"""What the small files of a whole checkpoint say of it: its type, its base model, its labels. Nothing is trusted."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..backbones.base_config import CONFIG_FILE as MODEL_CONFIG
from ..backbones.base_config import read_base_settings, read_settings
from ..errors import AdapterError
from ..hub.card_files import read_card
from ..hub.repo_files import CARD_FILE, MAX_CLASSES, optional_file
from .files import label_list


#: `AdapterInfo.peft_type` of a member that is all weights of a tuned model.
CHECKPOINT = "CHECKPOINT"

_REPO_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_NO_NAME = re.compile(r"LABEL_\d+|\d+")


def read_checkpoint_settings(folder: Path, where: str) -> dict[str, Any]:
    """The parsed `config.json` of a checkpoint: of a model type that backbones have, or of timm.

    Raises:
        AdapterError: it is refused, see [`read_base_settings`].
    """
    try:
        settings = read_settings(folder / MODEL_CONFIG)
    except (OSError, ValueError) as error:
        raise AdapterError(f"{where}: {MODEL_CONFIG}: {error}.") from error
    return settings if is_timm(settings) else read_base_settings(folder, where)


def is_timm(settings: dict[str, Any]) -> bool:
    """Whether timm wrote this `config.json`: it names an architecture of its own and no type."""
    return "model_type" not in settings and isinstance(settings.get("architecture"), str)


def read_base_name(folder: Path, where: str) -> str | None:
    """The one base model that the card names; None where there is no card, or none or several are named."""
    path = optional_file(folder, CARD_FILE, where)
    try:
        named = None if path is None else read_card(path).metadata.get("base_model")
    except (OSError, ValueError):
        return None
    if isinstance(named, list) and len(named) == 1:
        named = named[0]
    return named if isinstance(named, str) and _REPO_ID.fullmatch(named) else None


def named_in_config(settings: dict[str, Any]) -> str | None:
    """The base model that older transformers wrote into `config.json`: where the weights were loaded from."""
    named = settings.get("_name_or_path")
    return named if isinstance(named, str) and "/" in named and _REPO_ID.fullmatch(named) else None


def config_labels(settings: dict[str, Any], num_classes: int | None) -> tuple[str, ...] | None:
    """The names of `num_classes` classes from `id2label` (timm: `label_names`); None where they are only numbers."""
    named = {"id2label": settings.get("id2label"), "labels": settings.get("label_names") or settings.get("labels")}
    try:
        labels = label_list(named)
    except (KeyError, TypeError, ValueError):
        return None
    if not labels or len(labels) != num_classes or len(labels) > MAX_CLASSES:
        return None
    return None if all(_NO_NAME.fullmatch(label) for label in labels) else tuple(labels)


def is_multi_label(settings: dict[str, Any]) -> bool:
    """Whether an image may show several classes at once, so that each score is a probability of its own."""
    return settings.get("problem_type") == "multi_label_classification"
