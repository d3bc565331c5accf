"""Bytes that anyone may have written, read with limits: JSON, safetensors headers and the settings of an adapter.

Every function raises `ValueError` with the reason; the callers say in which repo and file. Nothing here allocates more
than the header or the text itself.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any


MAX_TEXT_BYTES = 10 * 1024**2
MAX_TENSOR_BYTES = 2 * 1024**3
MAX_FILE_BYTES = 8 * 1024**3
# upper bound: every dtype is counted as float32, which is what loading makes of it
_BYTES_PER_NUMBER = 4

#: Upper bound of ranks, numbers of blocks and the like, which PEFT turns into memory and loops.
MAX_SIZE_SETTING = 4096
_MAX_LONG_SETTING = 2**24
_LONG_SETTINGS = ("n_frequency", "theta_d_length")
_FREE_SETTINGS = re.compile(r"seed|key|alpha|lambda|step|warmup|interval|t?init$|t?final$|delta|layers_to_transform")
# keys with which transformers and diffusers find code in a repo
_CODE_KEYS = ("auto_map", "trust_remote_code", "custom_pipeline", "custom_pipelines", "_class_name")
# AdaLoRA may leave a layer without any rank
_MAY_BE_EMPTY = re.compile(r".*\.lora_[AEB]")


def read_text(path: Path, most: int = MAX_TEXT_BYTES) -> str:
    """The file as UTF-8. Raises `ValueError` where it is longer than `most` bytes."""
    size = path.stat().st_size
    if size > most:
        raise ValueError(f"{size} bytes, more than {most}")
    return path.read_text(encoding="utf-8")


def parse_json(text: str | bytes) -> Any:
    """JSON as the standard has it: no key twice, no NaN or infinity, no nesting that exhausts the stack."""
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_safetensors_header(path: Path) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor, from the header alone: names once, sizes positive and bounded, all inside the file."""
    header = _safetensors_json(path)
    shapes = {
        key: checked_shape(key, entry.get("shape") if isinstance(entry, dict) else None)
        for key, entry in header.items()
        if key != "__metadata__"
    }
    if not shapes:
        raise ValueError("it holds no tensors")
    check_total(shapes.values())
    return shapes


def safetensors_metadata(path: Path) -> Any:
    """What the header holds beside the tensors, None where that is nothing."""
    return _safetensors_json(path).get("__metadata__")


def check_total(shapes: Iterable[tuple[int, ...]]) -> None:
    """Refuse tensors that would be too large together."""
    total = sum(count(shape) for shape in shapes) * _BYTES_PER_NUMBER
    if total > MAX_FILE_BYTES:
        raise ValueError(f"its tensors would take {total} bytes as float32, more than {MAX_FILE_BYTES}")


def _safetensors_json(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"truncated, a header of {length} bytes in a file of {size}")
        if length > MAX_TEXT_BYTES:
            raise ValueError(f"its header has {length} bytes, more than {MAX_TEXT_BYTES}")
        header = parse_json(file.read(length))
    if not isinstance(header, dict):
        raise ValueError(f"its header must be a JSON object, got a {type(header).__name__}")
    return header


def count(shape: tuple[int, ...]) -> int:
    """How many numbers a tensor of this shape holds."""
    return math.prod(shape)


def check_settings(config: dict[str, Any]) -> None:
    """Refuse settings that name code or paths to load, or that would take absurd memory."""
    for key in _CODE_KEYS:
        if config.get(key):
            raise ValueError(f"it sets {key}={config[key]!r}; code or classes of a repo are never loaded")
    mapping = config.get("auto_mapping") or {}
    if not isinstance(mapping, dict):
        raise ValueError(f"auto_mapping must be a JSON object, got a {type(mapping).__name__}")
    library = mapping.get("parent_library") or "transformers"
    if not re.fullmatch(r"transformers(\.models(\.\w+)*)?", str(library)):
        raise ValueError(
            f"auto_mapping names the module {library!r}, which is not transformers'; where you trust the adapter, "
            "take auto_mapping out"
        )
    for key in ("base_model_name_or_path", "revision"):
        if not isinstance(config.get(key), (str, type(None))):
            raise ValueError(f"{key} must be a string, got {config[key]!r}")
    for key, value in config.items():
        if not _FREE_SETTINGS.search(key):
            _check_sizes(key, value, _MAX_LONG_SETTING if key in _LONG_SETTINGS else MAX_SIZE_SETTING)


def check_pattern(pattern: str) -> str:
    """A regular expression that cannot take exponential time: short, few quantifiers, none of them after a group."""
    quantifiers = re.findall(r"(?<!\\)[*+?{]", pattern)
    if len(pattern) > 200 or len(quantifiers) > 4 or re.search(r"(?<!\\)\)[*+?{]", pattern):
        shown = pattern if len(pattern) <= 200 else pattern[:200] + "..."
        raise ValueError(f"the pattern {shown!r} could take forever; write the modules' names out")
    re.compile(pattern)
    return pattern


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key[:200]!r} appears twice")
        result[key] = value
    return result


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def checked_shape(key: str, shape: Any) -> tuple[int, ...]:
    """The shape that a header gives a tensor, where it is one of a size that may be."""
    if not isinstance(shape, list) or not all(type(size) is int for size in shape):
        raise ValueError(f"{key[:200]} has no shape of whole numbers")
    shape, least = tuple(shape), 0 if _MAY_BE_EMPTY.fullmatch(key) else 1
    if len(shape) > 8 or any(size < least for size in shape):
        raise ValueError(f"{key[:200]} has the impossible shape {shape[:9]}")
    if count(shape) * _BYTES_PER_NUMBER > MAX_TENSOR_BYTES:
        raise ValueError(f"{key[:200]} has shape {shape}, more than 2 GiB as float32")
    return shape


def _check_sizes(key: str, value: Any, most: int) -> None:
    if isinstance(value, (int, float)) and abs(value) > most:
        raise ValueError(f"{key} is {value}, which is beyond {most}")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_sizes(key, inner, most)
