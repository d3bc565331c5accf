"""Files that are either whole or absent, their checksums, and errors that say why nothing can be written."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ..errors import StorageError


#: Why a file cannot be written that is no fault of the program: space, rights, limits.
_REFUSALS = ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "ENOTDIR", "EEXIST")
_REFUSED = {getattr(errno, name) for name in _REFUSALS if hasattr(errno, name)}
#: A folder of what is being written; the numbers are the writer's process and thread.
_PARTIAL = re.compile(r"\..+\.\d+\.partial")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write what is to become `path`: it does so at the end, and not at all where the writing fails.

    The bytes are on the disk before the name is, so that a machine that goes down leaves no empty file.

    Raises:
        StorageError: the disk is full or read-only, or the folder may not be written to.
    """
    with _partial_folder(path) as partial:
        yield partial / path.name
        _finish(partial / path.name)
        os.replace(partial / path.name, path)


@contextlib.contextmanager
def replacing_files(folder: Path) -> Iterator[Path]:
    """A folder to write to, whose files then take their places in `folder`, each whole or absent. As `replacing`."""
    with _partial_folder(folder / "files") as partial:
        yield partial
        written = sorted(partial.iterdir())
        for path in written:
            _finish(path)
        for path in written:
            os.replace(path, folder / path.name)


@contextlib.contextmanager
def _partial_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path`, gone at the end: safetensors writes to a name of its own first, which belongs there."""
    with refusals_explained(path):
        partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.partial")
        partial.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def remove_partials(folder: Path) -> None:
    """Delete what writers that were killed left in `folder` and below. Only for who alone may write there."""
    for path in [path for path in folder.rglob(".*.partial") if _PARTIAL.fullmatch(path.name)]:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def refusals_explained(path: Path) -> Iterator[None]:
    """Where the system refuses to write to `path`, say so, and what to do, as a `StorageError`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _error_number(error)
        if number is None or number not in _REFUSED:
            raise
        raise StorageError(
            f"{path} cannot be written: {os.strerror(number)}. What was finished is kept: make room, or choose "
            "another folder, and run the same command again."
        ) from error


def _error_number(error: Exception) -> int | None:
    """safetensors gives the system's number in words only."""
    found = re.search(r"os error (\d+)", str(error))
    return getattr(error, "errno", None) or (int(found[1]) if found else None)


def _finish(path: Path) -> None:
    """Bytes to the disk. Who may read the folder may read the file too: safetensors makes it for its owner alone."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    path.chmod(path.parent.stat().st_mode & 0o666)


def atomic_write(path: Path, data: bytes) -> None:
    """Write a file that is either whole or absent. Raises `StorageError` where it cannot be written."""
    with replacing(path) as partial:
        partial.write_bytes(data)


def atomic_save_tensors(path: Path, tensors: dict[str, torch.Tensor], header: str) -> None:
    """Write a safetensors file that is either whole or absent, with one metadata entry, `header`.

    One entry: safetensors writes several in random order, and the same content must give the same bytes.
    """
    with replacing(path) as partial:
        save_file({k: v.contiguous() for k, v in tensors.items()}, partial, metadata={"header": header})


def save_sealed(path: Path, tensors: dict[str, torch.Tensor], header: dict[str, Any]) -> None:
    """The same with a header of JSON, to which a checksum of it and of the tensors is added: see [`is_sealed`]."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    seal = _seal(tensors, header)
    atomic_save_tensors(path, tensors, json.dumps({**header, "seal": seal}, sort_keys=True))


def load_sealed(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and header of what `save_sealed` wrote. Raises `ValueError` where a single bit has changed."""
    header = read_header(path)
    seal = header.pop("seal", None)
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    if seal != _seal(tensors, header):
        raise ValueError("its checksum is wrong")
    return tensors, header


def read_header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file of ours. Raises `ValueError` where there is none."""
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {})["header"])
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"no header: {error}") from error
    if not isinstance(header, dict):
        raise ValueError("its header must be a JSON object")
    return header


def is_sealed(path: Path) -> bool:
    """Whether the file is as `save_sealed` wrote it. Raises `FileNotFoundError` where there is none."""
    try:
        load_sealed(path)
    except ValueError:
        return False
    return True


def tensors_sha256(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of tensors, wherever they are, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _seal(tensors: dict[str, torch.Tensor], header: dict[str, Any]) -> str:
    told = json.dumps(header, sort_keys=True)
    return hashlib.sha256((told + tensors_sha256(tensors)).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
