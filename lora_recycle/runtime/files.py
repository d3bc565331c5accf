"""Files and folders that are either whole or absent, their checksums, and errors that say why one is not written."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import filelock
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ..errors import StorageError
from .untrusted import parse_json
from .untrusted_tensors import read_safetensors_header


#: Why a file cannot be written that is no fault of the program: space, rights, limits, what lies there already.
_REFUSALS = ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "ENOTDIR", "EEXIST", "ENOTEMPTY")
#: The same of a folder that is a mount of its own, which cannot be replaced.
_MOUNTED = ("EBUSY", "EXDEV")
_REFUSED = {getattr(errno, name) for name in (*_REFUSALS, *_MOUNTED) if hasattr(errno, name)}
#: Names that begin so are this library's alone.
OWN_PREFIX = ".lora-recycle"
#: A folder of what is being written, and the lock in it that its writer holds.
_PARTIAL = re.compile(r"\.(.+)\.[0-9a-f]{16}\.partial")
_PARTIAL_LOCK = f"{OWN_PREFIX}.lock"
_ATTEMPTS = 3


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write what is to become `path`: it does so at the end, and not at all where the writing fails.

    The bytes are on the disk before the name is, so that a machine that goes down leaves no empty file.

    Raises:
        StorageError: the disk is full or read-only, or the folder may not be written to.
    """
    with refusals_explained(path), _partial_folder(path) as partial:
        yield partial / path.name
        _finish(partial / path.name)
        os.replace(partial / path.name, path)


@contextlib.contextmanager
def replacing_files(folder: Path, order: Callable[[str], Any] = str, removes: Sequence[str] = ()) -> Iterator[Path]:
    """A folder to write to, whose files then take their places in `folder`, each whole or absent. As `replacing`.

    Args:
        order: sorts the names of what was written, `a/b` below a folder; a run that is killed leaves the later ones
            as they were.
        removes: names that are deleted in `folder`, where they are not written anew, before a file takes its place.
    """
    with refusals_explained(folder), _partial_folder(folder / "files") as partial:
        (partial / "new").mkdir()
        yield partial / "new"
        new = partial / "new"
        names = sorted((p.relative_to(new).as_posix() for p in new.rglob("*") if p.is_file()), key=order)
        for name in names:
            _finish(new / name)
        for name in removes:
            if not (new / name).exists():
                (folder / name).unlink(missing_ok=True)
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(new / name, folder / name)


@contextlib.contextmanager
def creating_folder(folder: Path) -> Iterator[Path]:
    """A folder to write to, which becomes `folder` in one step. As `replacing`.

    Raises:
        StorageError: also where `folder` is there and not empty.
    """
    folder = Path(os.path.realpath(folder))  # an empty folder may be reached by a link
    remove_abandoned(folder.parent, folder.name)
    with refusals_explained(folder), _partial_folder(folder) as partial:
        new = partial / folder.name
        new.mkdir()
        yield new
        for path in new.rglob("*"):
            if path.is_file():
                _finish(path)
        with contextlib.suppress(FileNotFoundError):
            folder.rmdir()  # only an empty one goes
        new.rename(folder)


def check_writable(folder: Path) -> None:
    """Raise `StorageError` where no file can be written in `folder`, which is made where it is not there yet."""
    remove_abandoned(folder, "files")
    with replacing_files(folder):
        pass


@contextlib.contextmanager
def _partial_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path`, gone at the end: safetensors writes to a name of its own first, which belongs there.

    Its lock is held meanwhile, and given back by the system when the process dies: see `remove_abandoned`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, lock = _locked_folder(path)
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        lock.release(force=True)


def _locked_folder(path: Path) -> tuple[Path, filelock.BaseFileLock]:
    """A new folder beside `path`, and its lock, held wherever the file system has locks."""
    for _ in range(_ATTEMPTS):
        partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
        partial.mkdir()
        lock = filelock.FileLock(partial / _PARTIAL_LOCK)
        # who cleans up meanwhile may take it for abandoned before it is locked
        with contextlib.suppress(filelock.Timeout, FileNotFoundError, NotImplementedError):
            lock.acquire(timeout=0)
        if lock.is_locked and (partial / _PARTIAL_LOCK).exists():
            break
    partial.mkdir(exist_ok=True)
    return partial, lock


def is_partial(name: str) -> bool:
    """Whether a folder of this name is one of what is being written."""
    return _PARTIAL.fullmatch(name) is not None


def remove_abandoned(folder: Path, name: str | None = None) -> None:
    """Delete what writers that were killed left: of `name` in `folder`, or of anything in it and below.

    A folder is left alone whose writer lives, on whichever machine, and one without the lock that says it is ours.
    """
    for partial in folder.rglob(".*.partial") if name is None else folder.glob(".*.partial"):
        found = _PARTIAL.fullmatch(partial.name)
        if found and name in (None, found[1]) and partial.is_dir() and not partial.is_symlink():
            _remove_if_abandoned(partial)


def _remove_if_abandoned(partial: Path) -> None:
    if not (partial / _PARTIAL_LOCK).is_file():
        with contextlib.suppress(OSError):
            partial.rmdir()  # only an empty one goes: its writer was killed at once
        return
    lock = filelock.FileLock(partial / _PARTIAL_LOCK)
    with contextlib.suppress(filelock.Timeout, OSError, NotImplementedError):
        lock.acquire(timeout=0)
        shutil.rmtree(partial, ignore_errors=True)
        lock.release(force=True)


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
    match = re.search(r"os error (\d+)", str(error))
    return getattr(error, "errno", None) or (int(match[1]) if match else None)


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
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {})["header"])
        tensors = load_file(path)
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"no header: {error}") from error
    if not isinstance(header, dict) or header.pop("seal", None) != _seal(tensors, header):
        raise ValueError("its checksum is wrong")
    return tensors, header


def read_header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file that anyone may have written. Raises `ValueError` where there is none."""
    metadata = read_safetensors_header(path).metadata
    text = metadata.get("header") if isinstance(metadata, dict) else None
    header = parse_json(text) if isinstance(text, str) else None
    if not isinstance(header, dict):
        raise ValueError("it has no header that is a JSON object")
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
    text = json.dumps(header, sort_keys=True)
    return hashlib.sha256((text + tensors_sha256(tensors)).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
