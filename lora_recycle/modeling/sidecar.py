"""The files that make a plain PEFT folder a meta-LoRA."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import AdapterError
from ..hub.adapters import AdapterInfo
from ..hub.files import MAX_CLASSES, MAX_PICTURE_BYTES, PICTURE_FILE, checked_file
from ..hub.snapshots import fetch
from ..hub.untrusted import MAX_TENSOR_BYTES, parse_json, read_safetensors_header, read_text


TASK_FILE = "few_shot_task.safetensors"


def read_sidecar(path: Path) -> dict[str, Any]:
    """The sidecar's settings, empty where there is none. Raises `AdapterError` where it is damaged."""
    if not path.is_file():
        return {}
    try:
        settings = parse_json(read_text(path))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path}: the sidecar is damaged ({error}). Delete it to use the defaults.") from error
    if not isinstance(settings, dict):
        raise AdapterError(f"{path}: the sidecar must hold a JSON object.")
    if settings.get("metric", "cosine") not in ("cosine", "euclidean"):
        raise AdapterError(f"{path}: unknown metric {settings['metric']!r}; this version knows cosine and euclidean.")
    temperature = settings.get("temperature", 0.1)
    if not isinstance(temperature, (int, float)) or not temperature > 0:
        raise AdapterError(f"{path}: temperature must be a positive number, got {temperature!r}.")
    return settings


def read_picture(info: AdapterInfo) -> bytes | None:
    """The bytes of the picture beside a meta-LoRA, where they are a sound PNG of at most `MAX_PICTURE_BYTES`.

    Its pixels are not decoded: it is only passed on. Raises `AdapterError` where it is a link out of the repo.
    """
    if not (info.path / PICTURE_FILE).exists():
        return None
    path = checked_file(info.path, PICTURE_FILE, info.where)
    if path.stat().st_size > MAX_PICTURE_BYTES:
        return None
    data = path.read_bytes()
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            picture.verify()
    except Exception:  # noqa: BLE001 - what PIL raises for a file that anyone may have written
        return None
    return data


def task_file(info: AdapterInfo, settings: dict[str, Any], hub: dict[str, Any]) -> Path:
    """Where the fitted task lies if there is one; fetched from the Hub only where the sidecar announces it.

    Raises:
        AdapterError: it is announced, but not to be had.
    """
    path = info.path / TASK_FILE
    if info.revision is None or not settings.get("num_classes") or path.is_file():
        return path
    path = fetch(info.name, {TASK_FILE: MAX_TENSOR_BYTES}, info.revision, **hub) / TASK_FILE
    if not path.is_file():
        raise AdapterError(f"{info.where}: its fitted task, {TASK_FILE}, is not to be had: the repo has no such file.")
    return path


def read_task(path: Path, width: int) -> tuple[list[Any], Tensor, Tensor]:
    """Names of the classes, sums (C, width) of their images' features and float32 (C,) numbers of images.

    Raises:
        AdapterError: the file is damaged, or does not hold plain names and finite numbers of these shapes.
    """
    try:
        shapes = read_safetensors_header(path)
        with safe_open(path, "pt") as file:
            names = parse_json((file.metadata() or {})["header"])["label_names"]
            _check_task(names, shapes, width)
            sums, counts = file.get_tensor("sums"), file.get_tensor("counts")
        if not (sums.is_floating_point() and sums.isfinite().all() and (counts > 0).all()):
            raise ValueError("numbers that are no sums and counts")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise AdapterError(f"{path}: the fitted task cannot be read ({error!r}). Delete the file.") from error
    return names, sums, counts


def _check_task(names: Any, shapes: dict[str, tuple[int, ...]], width: int) -> None:
    plain = isinstance(names, list) and all(isinstance(name, (str, int, float)) for name in names)
    if not plain or not 1 <= len(names) <= MAX_CLASSES or len(set(names)) < len(names):
        raise ValueError(f"no list of 1 to {MAX_CLASSES} different labels")
    if shapes.get("sums") != (len(names), width) or shapes.get("counts") != (len(names),):
        raise ValueError(f"{len(names)} labels need sums {(len(names), width)} and counts, got {shapes}")
