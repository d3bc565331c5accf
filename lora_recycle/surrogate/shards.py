"""The shards of surrogate data, left on disk: checked once, then read row by row."""

from __future__ import annotations

import dataclasses
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from ..errors import DataError
from ..runtime.array_files import RowFile, safetensors_rows
from ..runtime.untrusted import parse_json, read_safetensors_header


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
    small = {name: rows for name, rows in shard.tensors.items() if name != "pixels"}
    for start in range(0, count, _CHUNK):
        check_values({name: rows.read_range(start, start + _CHUNK) for name, rows in small.items()})


_NUMBERS = (int, float)


def read_shard_header(text: str) -> dict[str, Any]:
    """The adapter that a shard's header names. Raises `ValueError` where it names none."""
    header = parse_json(text)
    return _adapter(header.get("adapter") if isinstance(header, dict) else None)


def check_values(tensors: dict[str, torch.Tensor]) -> None:
    """Raises `ValueError` where the numbers of some rows of a shard cannot be those of surrogate images."""
    for name, values in tensors.items():
        if values.is_floating_point() and not values.isfinite().all():
            raise ValueError(f"tensor {name} holds NaN or infinity")
    labels, classes = tensors["labels"], tensors["teacher_logits"].shape[1]
    if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"labels must lie in 0 to {classes - 1}, got {int(labels.min())} to {int(labels.max())}")
    if (tensors.get("kept_tokens", labels) < 0).any():
        raise ValueError("kept_tokens must not be negative")


def check_manifest(manifest: Any) -> None:
    """Raises `ValueError` where a manifest lacks what reading the data set needs, or leads out of its folder."""
    if not isinstance(manifest, dict) or not isinstance(manifest.get("shards"), list) or not manifest["shards"]:
        raise ValueError("it lists no shards")
    for key in ("config", "backbone"):
        if not isinstance(manifest.get(key, {}), dict):
            raise ValueError(f"{key} must be a JSON object")
    for entry in manifest["shards"]:
        if not isinstance(entry, dict):
            raise ValueError("a shard's entry must be a JSON object")
        _adapter(entry.get("adapter"))
        for key, kinds in (("num_images", int), ("accuracy", _NUMBERS), ("confidence", _NUMBERS), ("sha256", str)):
            if not isinstance(entry.get(key), kinds):
                raise ValueError(f"{key} of a shard is {entry.get(key)!r}")
        file = PurePosixPath(entry["file"] if isinstance(entry.get("file"), str) else "/")
        if file.is_absolute() or ".." in file.parts or "\\" in str(file) or file.suffix != ".safetensors":
            raise ValueError(f"it names a file outside the folder, or no shard: {entry.get('file')!r}")

    failed = manifest.get("failed", [])
    if not isinstance(failed, list) or not all(
        isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("name", "sha256", "reason"))
        for entry in failed
    ):
        raise ValueError("failed must list adapters by name, sha256 and reason")


def _adapter(entry: Any) -> dict[str, Any]:
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("name", "sha256")):
        raise ValueError("it names no adapter with its checksum")
    labels = entry.get("labels")
    if labels is not None and not (isinstance(labels, list) and all(isinstance(name, str) for name in labels)):
        raise ValueError("labels of an adapter must be names")
    return entry
