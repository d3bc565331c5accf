"""The shards of surrogate data, left on disk: checked once, then read row by row."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from ..errors import DataError
from ..runtime.array_files import RowFile, safetensors_rows
from ..runtime.untrusted import parse_json
from ..runtime.untrusted_tensors import read_safetensors_header
from .manifest import check_source


#: type and number of dimensions of each tensor of a shard; `kept_tokens` only where tokens were pruned
TENSORS = {
    "pixels": (np.uint8, 4),
    "labels": (np.int64, 1),
    "teacher_logits": (np.float32, 2),
    "teacher_features": (np.float16, 2),
    "kept_tokens": (np.int16, 2),
}
_OPTIONAL = "kept_tokens"
_CHUNK = 1024  # rows that are looked at together


@dataclasses.dataclass(frozen=True)
class ShardRows:
    """The surrogate images of one adapter, as [`Shard`] has them, on disk."""

    adapter: dict[str, Any]
    tensors: dict[str, RowFile]

    def __len__(self) -> int:
        return len(self.tensors["labels"])

    @property
    def labels(self) -> torch.Tensor:
        """int64 (N,), read now."""
        return self.tensors["labels"].read_range(0, len(self))


def open_shard(path: Path) -> ShardRows:
    """Open one shard and look through it once. Raises `DataError` where it is missing, damaged or of another form."""
    try:
        header = read_safetensors_header(path)
        with safe_open(path, "pt"):  # checks that all tensors lie in the file and none over another
            metadata = header.metadata or {}
        missing = sorted(set(TENSORS) - {_OPTIONAL} - header.tensors.keys())
        if missing or "header" not in metadata:
            raise DataError(f"{path}: not a surrogate shard, {(missing or ['its header'])[0]} is missing.")
        rows = safetensors_rows(path, header)
        kept = {name: rows[name] for name in TENSORS if name in rows}
        shard = ShardRows(read_shard_header(metadata["header"]), kept)
        _check(shard)
    except (OSError, SafetensorError, ValueError) as error:
        raise DataError(f"{path}: the shard is missing or damaged ({error}). Run invert again.") from error
    return shard


def _check(shard: ShardRows) -> None:
    """Types, shapes and, a chunk of rows at a time, numbers. Raises `ValueError`."""
    count, labels = len(shard.tensors["pixels"]), shard.adapter.get("labels")
    for name, rows in shard.tensors.items():
        dtype, ndim = TENSORS[name]
        if len(rows.shape) != ndim:
            raise ValueError(f"tensor {name} must have {ndim} dimensions")
        if rows.dtype != dtype or len(rows) != count:
            raise ValueError(f"tensor {name} has the wrong type or number of rows")
    if shard.tensors["pixels"].shape[1] != 3:
        raise ValueError(f"pixels must have 3 channels, got {shard.tensors['pixels'].shape[1]}")
    classes = shard.tensors["teacher_logits"].shape[1]
    if labels and len(labels) != classes:
        raise ValueError(f"{len(labels)} labels for {classes} classes")
    height, width = shard.tensors["pixels"].shape[2:]
    small = {name: rows for name, rows in shard.tensors.items() if name != "pixels"}
    for start in range(0, count, _CHUNK):
        check_values({name: rows.read_range(start, start + _CHUNK) for name, rows in small.items()}, height * width)


def read_shard_header(text: str) -> dict[str, Any]:
    """The adapter that a shard's header names. Raises `ValueError` where it names none."""
    header = parse_json(text)
    return check_source(header.get("adapter") if isinstance(header, dict) else None)


def check_values(tensors: dict[str, torch.Tensor], most_patches: int) -> None:
    """Raises `ValueError` where the numbers of some rows of a shard cannot be those of surrogate images.

    Args:
        most_patches: more than an image can have.
    """
    for name, values in tensors.items():
        if values.is_floating_point() and not values.isfinite().all():
            raise ValueError(f"tensor {name} holds NaN or infinity")
    labels, classes = tensors["labels"], tensors["teacher_logits"].shape[1]
    if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"labels must lie in 0 to {classes - 1}, got {int(labels.min())} to {int(labels.max())}")
    kept = tensors.get("kept_tokens")
    if kept is not None and not ((kept >= 0) & (kept < most_patches)).all():
        raise ValueError(
            f"kept_tokens must lie in 0 to {most_patches - 1}, got {int(kept.min())} to {int(kept.max())}"
        )


def check_alike(shards: Sequence[ShardRows]) -> None:
    """Raise `DataError` where images, features or masks of shards differ in size, and so fit no common batch."""
    for name in ("pixels", "teacher_features", _OPTIONAL):
        rows = [shard.tensors[name] for shard in shards if name in shard.tensors]
        other = next((one for one in rows if one.shape[1:] != rows[0].shape[1:]), None)
        if other is not None:
            raise DataError(
                f"{other.path}: {name} of an image has the shape {other.shape[1:]}, but {rows[0].shape[1:]} in "
                f"{rows[0].path.name}. All shards must come from one run of invert."
            )
