"""Files that are either whole or absent, and their checksums."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write what is to become `path`: it does so at the end, and not at all where the writing fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def atomic_write(path: Path, data: bytes) -> None:
    """Write a file that is either whole or absent."""
    with replacing(path) as partial:
        partial.write_bytes(data)


def atomic_save_tensors(path: Path, tensors: dict[str, torch.Tensor], header: str) -> None:
    """Write a safetensors file that is either whole or absent, with one metadata entry, `header`.

    One entry: safetensors writes several in random order, and the same content must give the same bytes.
    """
    with replacing(path) as partial:
        save_file({k: v.contiguous() for k, v in tensors.items()}, partial, metadata={"header": header})


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
