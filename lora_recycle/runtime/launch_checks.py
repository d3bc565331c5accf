"""What the machines of a launch must agree on before they work: the recipe, the adapters, the folder written to."""

from __future__ import annotations

import json
import socket
import time
import uuid
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object

from ..errors import ConfigError, StorageError
from ..version import __version__
from .config import differences
from .files import OWN_PREFIX, atomic_write, check_writable
from .heartbeat import Heartbeat
from .launch import collective_timeout, process_state


MARK_FILE = f"{OWN_PREFIX}.launch"
#: Seconds that a file of another machine may take to be seen: network file systems remember what was not there.
_SEEN_WITHIN = 60.0


def check_same(**parts: Any) -> None:
    """Raise `ConfigError` where a process of the launch has other `parts`, JSON, than the main process.

    Several machines are started by several commands, which may have come out of step: another recipe, a pool folder
    with other adapters. All processes must call this; in one process nothing happens.
    """
    if process_state().num_processes == 1:
        return
    mine = {"version of lora_recycle": __version__, "version of torch": torch.__version__, **parts}
    with Heartbeat("begin"):
        everyone = gather_object([(_this_process(), json.loads(json.dumps(mine)))])
    first, expected = everyone[0]
    for other, actual in everyone:
        if differing := [name for name in expected | actual if expected.get(name) != actual.get(name)]:
            reason = ", ".join(f"{name}{_both(expected.get(name), actual.get(name))}" for name in differing)
            raise ConfigError(
                f"{first} and {other} of this launch do not do the same: they differ in {reason}. Start the same "
                "command on all machines, with the same files and packages."
            )


def check_shared(folder: Path) -> None:
    """Raise `StorageError` where `folder` is not one folder that all processes of the launch see and may write to.

    The main process makes it, where it is not there yet, and leaves a mark that the others must find. All processes
    must call this; in one process nothing happens.
    """
    state = process_state()
    if state.num_processes == 1:
        return
    with Heartbeat("begin"):
        mark = uuid.uuid4().hex
        if state.is_main_process:
            atomic_write(folder / MARK_FILE, mark.encode())
        mark, leader = broadcast_object_list([mark, f"{_this_process()} in {folder.absolute()}"])
        wrong = [reason for reason in gather_object([_find(folder, mark, leader)]) if reason]
        if state.is_main_process:
            (folder / MARK_FILE).unlink(missing_ok=True)
    if wrong:
        raise StorageError(wrong[0])


def _find(folder: Path, mark: str, leader: str) -> str:
    """What keeps this process from sharing `folder` with `leader`; empty where nothing does."""
    end = time.monotonic() + min(_SEEN_WITHIN, collective_timeout() / 10)
    while not _holds(folder / MARK_FILE, mark):
        if time.monotonic() > end:
            return (
                f"{_this_process()} does not see in {folder.absolute()} what {leader} wrote. All machines must write "
                "to one folder, on a file system that they share: give each its path there as --output."
            )
        time.sleep(0.1)
    try:
        check_writable(folder)
    except StorageError as error:
        return f"{_this_process()}: {error}"
    return ""


def _holds(path: Path, mark: str) -> bool:
    try:
        return path.read_text(encoding="utf-8") == mark
    except OSError:
        return False


def _this_process() -> str:
    return f"process {process_state().process_index} on {socket.gethostname()}"


def _both(one: Any, other: Any) -> str:
    """How values differ; of lists of checksums it says nothing."""
    if isinstance(one, dict) and isinstance(other, dict):
        return f" ({differences(one, other)})"
    return "" if isinstance(one, list) else f" ({one} and {other})"
