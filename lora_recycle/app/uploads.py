"""The folder of what visitors drop on the page, and which paths lie in it."""

from __future__ import annotations

import atexit
import functools
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any


@functools.cache
def upload_folder() -> Path:
    """This process's own folder for uploads, which no other user can read and which goes when the process ends.

    It lies in `GRADIO_TEMP_DIR` where that is set, else in the system's temporary folder; from here on Gradio, which
    reads that variable, writes to it.
    """
    parent = os.environ.get("GRADIO_TEMP_DIR")
    if parent:
        Path(parent).mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="lora-recycle-app-", dir=parent)).resolve()
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def is_upload(path: Any) -> bool:
    """Whether this names a place in the upload folder, in plain words: absolute, without `..`, not through a link.

    Nothing is said of whether there is a file.
    """
    if not isinstance(path, str) or "\0" in path:
        return False
    named = Path(path)
    if not named.is_absolute() or ".." in named.parts:
        return False
    try:
        return named.resolve().is_relative_to(upload_folder())
    except (OSError, RuntimeError):  # a loop of links, a name that is too long
        return False


def only_uploads(value: Any) -> bool:
    """Whether every `path` anywhere in this JSON value names an upload, or nothing."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if value.get("path") is not None and not is_upload(value["path"]):
                return False
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return True


def without_folder(message: str) -> str:
    """The message with uploads called by their own names: where they lie is nobody's business."""
    return re.sub(re.escape(str(upload_folder())) + r"/(\w+/)?", "", message)
