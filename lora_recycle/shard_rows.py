"""The shards of surrogate data, left on disk: checked once, then read row by row."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from .errors import DataError
from .rows import RowFile, safetensors_rows


#: type and number of dimensions of each tensor of a shard; `kept_tokens` only where tokens were pruned
TENSORS = {
    "pixels": (np.uint8, 4),
    "labels": (np.int64, 1),
    "teacher_logits": (np.float32, 2),
    "teacher_features": (np.float16, 2),
    "kept_tokens": (np.int16, 2),
}
_OPTIONAL = "kept_tokens"


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
    """Open one shard. Raises `DataError` where it is missing, damaged or of another form."""
    try:
        with safe_open(path, "pt") as file:  # checks that all tensors lie in the file and none over another
            metadata, names = file.metadata() or {}, set(file.keys())
        missing = sorted(set(TENSORS) - {_OPTIONAL} - names)
        if missing or "header" not in metadata:
            raise DataError(f"{path}: not a surrogate shard, {(missing or ['its header'])[0]} is missing.")
        tensors = safetensors_rows(path, [name for name in TENSORS if name in names])
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: the shard is missing or damaged ({error}). Run invert again.") from error
    for name, rows in tensors.items():
        dtype, ndim = TENSORS[name]
        if len(rows.shape) != ndim:
            raise DataError(f"{path}: tensor {name} must have {ndim} dimensions.")
        if rows.dtype != dtype or len(rows) != len(tensors["pixels"]):
            raise DataError(f"{path}: tensor {name} has the wrong type or number of rows.")
    try:
        shard = ShardRows(json.loads(metadata["header"])["adapter"], tensors)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: the header names no adapter ({error!r}). Run invert again.") from error
    _check_labels(path, shard)
    return shard


def _check_labels(path: Path, shard: ShardRows) -> None:
    labels, classes = shard.labels, shard.tensors["teacher_logits"].shape[1]
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise DataError(f"{path}: labels must lie in 0 to {classes - 1}, got {int(labels.max())}.")
