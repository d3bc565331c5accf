"""Where a run may write: a folder that is new, empty, or this library's own and of the same kind. Nothing of anyone
else is ever replaced or deleted."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import StorageError
from .files import OWN_PREFIX, atomic_write, check_writable, is_partial, refusals_explained, remove_abandoned
from .untrusted import parse_json
from .untrusted_files import check_utf8, read_text


#: Says what a folder is for, from before the first result is in it.
MARKER = f"{OWN_PREFIX}.json"


@dataclass(frozen=True)
class OutputKind:
    """What a folder holds.

    Args:
        name: as errors and the marker give it, e.g. `surrogate data`.
        known: whether a folder without a marker holds results of this kind, by a file that only this library writes.
    """

    name: str
    known: Callable[[Path], bool]


def holds_json(path: Path, *keys: str) -> bool:
    """Whether a file is a JSON object with these keys, or a list of such."""
    try:
        found = parse_json(read_text(path))
    except (OSError, ValueError):
        return False
    items = found if isinstance(found, list) else [found]
    return bool(items) and all(isinstance(item, dict) and item.keys() >= set(keys) for item in items)


def check_output(folder: str | Path, kind: OutputKind | None = None) -> None:
    """Make sure that nothing of anyone else can be lost in `folder`. Nothing is written.

    Args:
        kind: what is to be written there; by default the folder must be new or empty.

    Raises:
        StorageError: it holds something that this library did not write as such, or is no folder.
    """
    folder = Path(folder)
    try:
        check_utf8(folder.absolute())
    except ValueError as error:
        raise StorageError(f"{folder}: {error}.") from error
    if not os.path.lexists(folder):
        return
    with refusals_explained(folder):
        every = sorted(path.name for path in folder.iterdir())
    present = [name for name in every if not _is_own(name)] if kind else every
    if not present or (kind and _is_of_kind(folder, kind)):
        return
    shown = ", ".join(present[:3]) + (f" and {len(present) - 3} more" if len(present) > 3 else "")
    found = f"holds {_marked(folder) or 'other files'} ({shown})"
    wanted = "a new or an empty folder" if kind is None else f"a new folder, or one that holds {kind.name}"
    raise StorageError(f"{folder}: {found}, which is not replaced. Name {wanted}.")


def claim_output(folder: str | Path, kind: OutputKind) -> None:
    """Make sure as [`check_output`] does, make the folder, clear away what a killed run had begun, and mark it."""
    folder = Path(folder)
    check_output(folder, kind)
    check_writable(folder)
    remove_abandoned(folder)
    if _marked(folder) != kind.name:
        atomic_write(folder / MARKER, json.dumps({"kind": kind.name}).encode())


def check_file(path: str | Path, known: Callable[[Path], bool], what: str) -> None:
    """Make sure that a file can be written, and that one that is there already is `what` this library wrote.

    Raises:
        StorageError: it is something else, or nothing can be written there.
    """
    path = Path(path)
    if os.path.lexists(path) and not (path.is_file() and known(path)):
        raise StorageError(f"{path}: is there already, and is not {what}, so it is not replaced. Name another file.")
    check_writable(path.parent)


def _is_of_kind(folder: Path, kind: OutputKind) -> bool:
    marked = _marked(folder)
    return kind.known(folder) if marked is None else marked == kind.name


def _marked(folder: Path) -> str | None:
    """What the folder's marker says; None where there is none."""
    try:
        found: Any = parse_json(read_text(folder / MARKER))
    except (OSError, ValueError):
        return None
    return str(found.get("kind"))[:80] if isinstance(found, dict) else None


def _is_own(name: str) -> bool:
    """Whether a file or folder has a name that no one else gives: locks, markers, and what is being written."""
    return name.startswith(OWN_PREFIX) or is_partial(name)
