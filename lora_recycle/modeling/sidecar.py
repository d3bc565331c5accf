"""The files that make a plain PEFT folder a meta-LoRA."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ..errors import AdapterError, ConfigError
from ..hub.adapters import AdapterInfo
from ..hub.snapshots import fetch
from .heads import make_head


TASK_FILE = "few_shot_task.safetensors"
MAX_PICTURE_BYTES = 10 * 1024**2
_MAX_LIST = 100  # a head's parameters are a few numbers


def read_sidecar(path: Path, head: str | None = None) -> dict[str, Any]:
    """The sidecar's settings, empty where there is none. Raises `AdapterError` where it is damaged.

    Args:
        head: the one that is wanted, whichever the sidecar names.
    """
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise AdapterError(f"{path}: the sidecar is damaged ({error}). Delete it to use the defaults.") from error
    if not isinstance(settings, dict):
        raise AdapterError(f"{path}: the sidecar must hold a JSON object.")
    if settings.get("metric", "cosine") not in ("cosine", "euclidean"):
        raise AdapterError(f"{path}: unknown metric {settings['metric']!r}; this version knows cosine and euclidean.")
    temperature = settings.get("temperature", 0.1)
    if not isinstance(temperature, (int, float)) or not temperature > 0:
        raise AdapterError(f"{path}: temperature must be a positive number, got {temperature!r}.")
    _check_head(head or settings.get("head", "class_centres"), settings, path)
    return settings


def _check_head(name: str, settings: dict[str, Any], path: Path) -> None:
    """Raises `AdapterError` where the head cannot be made, so that it is told with the file."""
    every = settings.get("head_parameters", {})
    if not isinstance(every, dict) or not all(isinstance(one, dict) for one in every.values()):
        raise AdapterError(f"{path}: head_parameters must hold an object for each head.")
    for head, parameters in every.items():
        for key, value in parameters.items():
            numbers = value if isinstance(value, list) else [value]
            if len(numbers) > _MAX_LIST or not all(_positive(number) for number in numbers):
                raise AdapterError(f"{path}: {key} of the head {head} must be positive, got {str(value)[:80]}.")
    try:
        make_head(name, settings)
    except (ConfigError, TypeError) as error:
        raise AdapterError(f"{path}: {error} Pass head=... to use another, or upgrade lora_recycle.") from error


def _positive(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and value > 0 and math.isfinite(value)


def read_picture(path: Path) -> bytes | None:
    """The PNG beside a meta-LoRA in a local folder, where it has one of reasonable size."""
    return path.read_bytes() if path.is_file() and path.stat().st_size <= MAX_PICTURE_BYTES else None


def task_file(info: AdapterInfo, settings: dict[str, Any], hub: dict[str, Any]) -> Path:
    """Where the fitted task lies if there is one; fetched from the Hub only where the sidecar announces it.

    Raises:
        AdapterError: it is announced, but not to be had.
    """
    path = info.path / TASK_FILE
    if info.revision is None or not settings.get("num_classes") or path.is_file():
        return path
    path = fetch(info.name, [TASK_FILE], info.revision, **hub) / TASK_FILE
    if not path.is_file():
        raise AdapterError(f"{info.where}: its fitted task, {TASK_FILE}, is not to be had: the repo has no such file.")
    return path
