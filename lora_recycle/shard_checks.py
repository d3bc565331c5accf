"""Surrogate data that anyone may have written: what a shard and a manifest must hold to be used."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

import torch

from .hub.untrusted import parse_json


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


def _adapter(told: Any) -> dict[str, Any]:
    if not isinstance(told, dict) or not all(isinstance(told.get(key), str) for key in ("name", "sha256")):
        raise ValueError("it names no adapter with its checksum")
    labels = told.get("labels")
    if labels is not None and not (isinstance(labels, list) and all(isinstance(name, str) for name in labels)):
        raise ValueError("labels of an adapter must be names")
    return told
