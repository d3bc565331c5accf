"""One run at a time in a folder."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import filelock

from ..errors import StorageError
from .files import (
    OWN_PREFIX,
    atomic_write,
    check_writable,
    refusals_explained,
    remove_abandoned,
)
from .launch_checks import check_shared
from .outputs import OutputKind, check_output, claim_output


LOCK_FILE, OWNER_FILE = f"{OWN_PREFIX}.lock", f"{OWN_PREFIX}.owner.json"
logger = logging.getLogger(__name__)


@contextlib.contextmanager
def only_run_in(folder: str | Path | None, kind: OutputKind | None = None, *, needed: bool = True) -> Iterator[None]:
    """Hold `folder`, made where it is not there, against other runs.

    Of the processes of a launch one holds it (`needed`), and all make sure that it is the same folder for all of them.

    The system holds the lock for as long as this process lives, so one that was killed leaves none behind, whatever
    the clock says and whoever got its process number. A file beside it says who holds it. What a killed run had begun
    to write is deleted.

    Args:
        kind: what the run writes there. With it `folder` must be new, empty or of this kind, and is marked so.

    Raises:
        StorageError: another run holds it, it holds something else, nothing can be written there, or it is not shared
            by all processes.
    """
    if folder is None:
        yield
        return
    folder = Path(folder)
    if not needed:
        check_shared(folder)
        yield
        return
    if kind is not None:
        check_output(folder, kind)
    lock = filelock.FileLock(folder / LOCK_FILE)
    with refusals_explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        check_writable(folder)  # first: a lock that cannot be made would pass for one that is held
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise StorageError(
                f"{folder}: another run{_owner(folder)} is at work here. Wait for it, or choose another folder."
            ) from None
    try:
        if (folder / OWNER_FILE).is_file():
            logger.warning("%s: an earlier run%s was killed; its lock is taken over.", folder, _owner(folder))
        if kind is not None:
            claim_output(folder, kind)
        remove_abandoned(folder)
        atomic_write(folder / OWNER_FILE, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
        check_shared(folder)
        yield
    finally:
        with contextlib.suppress(OSError):
            (folder / OWNER_FILE).unlink()
        lock.release()


def _owner(folder: Path) -> str:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        owner = json.loads((folder / OWNER_FILE).read_text(encoding="utf-8"))
        return f" (process {int(owner['pid'])} on {str(owner['host'])[:200]})"
    return ""
