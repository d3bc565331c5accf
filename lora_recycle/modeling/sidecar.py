"""The files that make a plain PEFT folder a meta-LoRA."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from PIL import Image

from ..adapters.experts import read_domains
from ..adapters.files import check_task, read_sidecar_json
from ..adapters.places import join_name, split_name
from ..adapters.pull import AdapterInfo
from ..errors import AdapterError, ConfigError
from ..fewshot.heads import make_head
from ..hub.download import HubOptions, fetch
from ..hub.repo_files import MAX_PICTURE_BYTES, PICTURE_FILE, TASK_FILE, optional_file
from ..runtime.untrusted_tensors import MAX_TENSOR_BYTES


#: Of what is written. In 1, some heads and settings had other names.
FORMAT_VERSION = 2
_HEADS_OF_1 = {
    "class_centres": "prototypes",
    "cosine_centres": "cosine_prototypes",
    "euclidean_centres": "euclidean_prototypes",
}
_SETTINGS_OF_1 = {"held_out": "validation_fraction", "judge_every": "eval_steps", "checkpoint_every": "save_steps"}
# a head's parameters are a few numbers, neither so small nor so large that scores overflow
_MAX_LIST = 100
_LEAST, _MOST = 1e-6, 1e6


def read_sidecar(path: Path, head: str | None = None) -> dict[str, Any]:
    """The sidecar's settings, empty where there is none. Raises `AdapterError` where it is damaged.

    Args:
        head: the one that is wanted, whichever the sidecar names.
    """
    settings = read_sidecar_json(path.parent, str(path.parent))
    if not settings:
        return {}
    settings = _upgraded(settings, path)
    metric, temperature = settings.get("metric", "cosine"), settings.get("temperature", 0.1)
    if metric not in ("cosine", "euclidean"):
        raise AdapterError(f"{path}: unknown metric {_short(metric)}; this version knows cosine and euclidean.")
    if not _is_sound(temperature):
        raise AdapterError(
            f"{path}: temperature must be a positive number, {_LEAST} to {_MOST}, got {_short(temperature)}."
        )
    _check_head(head or settings.get("head", "prototypes"), settings, path)
    read_domains(settings, str(path.parent))
    return settings


def _upgraded(settings: dict[str, Any], path: Path) -> dict[str, Any]:
    """The settings by today's names. Raises `AdapterError` where a later version wrote them."""
    version = settings.get("format_version", 1)
    if version == FORMAT_VERSION:
        return settings
    if version != 1:
        raise AdapterError(
            f"{path}: the sidecar has format {_short(version)}, this version of lora_recycle reads 1 and 2."
        )
    renamed = {"head": _HEADS_OF_1.get(str(settings.get("head")), settings.get("head"))} if "head" in settings else {}
    for key, names in (("head_parameters", _HEADS_OF_1), ("distillation", _SETTINGS_OF_1)):
        if isinstance(settings.get(key), dict):
            renamed[key] = {names.get(name, name): value for name, value in settings[key].items()}
    return settings | renamed


def _check_head(name: str, settings: dict[str, Any], path: Path) -> None:
    """Raises `AdapterError` where the head cannot be made, so that the error names the file."""
    every = settings.get("head_parameters", {})
    if not isinstance(every, dict) or not all(isinstance(one, dict) for one in every.values()):
        raise AdapterError(f"{path}: head_parameters must hold an object for each head.")
    for head, parameters in every.items():
        for key, value in parameters.items():
            numbers = value if isinstance(value, list) else [value]
            if len(numbers) > _MAX_LIST or not all(_is_sound(number) for number in numbers):
                raise AdapterError(
                    f"{path}: {key[:80]} of the head {head[:80]} must be positive, from {_LEAST} to {_MOST}, or at "
                    f"most {_MAX_LIST} such numbers, got {_short(value)}."
                )
    try:
        make_head(name, settings)
    except (ConfigError, TypeError) as error:
        raise AdapterError(f"{path}: {error} Pass head=... to use another, or upgrade lora_recycle.") from error


def _is_sound(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and _LEAST <= value <= _MOST


def _short(value: Any) -> str:
    return f"a {type(value).__name__}" if isinstance(value, (list, dict)) else repr(value)[:80]


def read_picture(info: AdapterInfo) -> bytes | None:
    """The bytes of the picture beside a meta-LoRA, where they are a sound PNG of at most `MAX_PICTURE_BYTES`.

    Its pixels are not decoded: it is only passed on. Raises `AdapterError` where it is a link out of the repo.
    """
    path = optional_file(info.path, PICTURE_FILE, info.where)
    if path is None or path.stat().st_size > MAX_PICTURE_BYTES:
        return None
    data = path.read_bytes()
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            picture.verify()
    except Exception:  # noqa: BLE001 - what PIL raises for a file that anyone may have written
        return None
    return data


def task_file(info: AdapterInfo, settings: dict[str, Any], hub: HubOptions) -> Path | None:
    """Where the fitted task lies, None where there is none; fetched from the Hub only where the sidecar announces it.

    Raises:
        AdapterError: it is announced but missing, a link out of the repo, or not the one that was saved with the rest.
    """
    folder = info.path
    if info.revision is not None and settings.get("num_classes") and not (folder / TASK_FILE).is_file():
        repo, sub = split_name(info.name)
        folder = fetch(repo, {join_name(sub, TASK_FILE) if sub else TASK_FILE: MAX_TENSOR_BYTES}, info.revision, **hub)
        folder /= sub
        if not (folder / TASK_FILE).is_file():
            raise AdapterError(f"{info.where}: the repo has not the fitted task that it announces, {TASK_FILE}.")
    return check_task(folder, info.where, settings)
