"""Headers of safetensors files that anyone may have written: checked before any tensor is read.

Every function raises `ValueError` with the reason; the callers say in which repo and file.
"""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from .untrusted import parse_json
from .untrusted_files import MAX_TEXT_BYTES, open_regular


MAX_TENSOR_BYTES = 2 * 1024**3
MAX_FILE_BYTES = 8 * 1024**3
# upper bound: every dtype is counted as float32, which is what loading makes of it
_BYTES_PER_NUMBER = 4
#: Of a file: tensors, characters of a name, and parts of a name between dots.
MAX_TENSORS, MAX_NAME, MAX_NAME_PARTS = 10_000, 500, 40
# AdaLoRA may leave a layer without any rank
_MAY_BE_EMPTY = re.compile(r".*\.lora_[AEB]")


@dataclass(frozen=True)
class TensorEntry:
    """What a header says of one tensor; its bytes lie from `begin` to `end` after the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class SafetensorsHeader:
    """The header of a safetensors file, of which nothing is read beyond it.

    Args:
        tensors (`dict[str, TensorEntry]`): by name, in the header's order.
        metadata: what it holds beside the tensors, None where that is nothing.
        size (`int`): bytes of the file before the tensors' own.
    """

    tensors: dict[str, TensorEntry]
    metadata: Any
    size: int

    def bounded_shapes(self, most: int = MAX_FILE_BYTES) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor.

        Raises:
            ValueError: there is none, or they would take more than `most` bytes as float32.
        """
        if not self.tensors:
            raise ValueError("it holds no tensors")
        shapes = {name: checked_shape(name, list(entry.shape)) for name, entry in self.tensors.items()}
        check_total(shapes.values(), most)
        return shapes


def read_safetensors_header(path: Path) -> SafetensorsHeader:
    """The header of a file: names once, few and short, sizes whole numbers, and all of it within bounds."""
    with open_regular(path) as file:
        return _read_header(file, os.fstat(file.fileno()).st_size)


def parse_safetensors_header(data: bytes) -> SafetensorsHeader:
    """The same of a file's bytes."""
    return _read_header(io.BytesIO(data), len(data))


def _read_header(file: BinaryIO, size: int) -> SafetensorsHeader:
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise ValueError(f"truncated, a header of {length} bytes in a file of {size}")
    if length > MAX_TEXT_BYTES:
        raise ValueError(f"its header has {length} bytes, more than {MAX_TEXT_BYTES}")
    header = parse_json(file.read(length))
    if not isinstance(header, dict):
        raise ValueError(f"its header must be a JSON object, got a {type(header).__name__}")
    metadata = header.pop("__metadata__", None)
    check_names(header)
    return SafetensorsHeader({name: _entry(name, told) for name, told in header.items()}, metadata, 8 + length)


def _entry(name: str, told: Any) -> TensorEntry:
    told = told if isinstance(told, dict) else {}
    shape, offsets = told.get("shape"), told.get("data_offsets")
    if not _whole_numbers(shape):
        raise ValueError(f"{name} has no shape of whole numbers")
    if not _whole_numbers(offsets) or len(offsets) != 2 or not isinstance(told.get("dtype"), str):
        raise ValueError(f"{name} has no dtype and data_offsets")
    return TensorEntry(told["dtype"], tuple(shape), *offsets)


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int for size in value)


def check_names(names: Iterable[str]) -> None:
    """Refuse tensors that are too many, or whose names are no paths of modules."""
    names = list(names)
    if len(names) > MAX_TENSORS:
        raise ValueError(f"it holds {len(names)} tensors, more than {MAX_TENSORS}")
    for name in names:
        if len(name) > MAX_NAME or name.count(".") >= MAX_NAME_PARTS:
            raise ValueError(
                f"a tensor's name has {len(name)} characters and {name.count('.') + 1} parts, more than {MAX_NAME} "
                f"or {MAX_NAME_PARTS}: {name[:80]}..."
            )


def check_total(shapes: Iterable[tuple[int, ...]], most: int = MAX_FILE_BYTES) -> None:
    """Refuse tensors that would be too large together."""
    total = sum(count(shape) for shape in shapes) * _BYTES_PER_NUMBER
    if total > most:
        raise ValueError(f"its tensors would take {total} bytes as float32, more than {most}")


def count(shape: tuple[int, ...]) -> int:
    """How many numbers a tensor of this shape holds."""
    return math.prod(shape)


def checked_shape(key: str, shape: Any) -> tuple[int, ...]:
    """The shape that a header gives a tensor, where it is one of a size that may be."""
    if not _whole_numbers(shape):
        raise ValueError(f"{key[:200]} has no shape of whole numbers")
    shape, least = tuple(shape), 0 if _MAY_BE_EMPTY.fullmatch(key) else 1
    if len(shape) > 8 or any(size < least for size in shape):
        raise ValueError(f"{key[:200]} has the impossible shape {shape[:9]}")
    if count(shape) * _BYTES_PER_NUMBER > MAX_TENSOR_BYTES:
        raise ValueError(f"{key[:200]} has shape {shape}, more than 2 GiB as float32")
    return shape
