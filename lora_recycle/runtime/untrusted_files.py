"""Files that anyone may have written, opened and read with limits.

Every function raises `ValueError` with the reason; the callers say in which repo and file.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path
from typing import BinaryIO


MAX_TEXT_BYTES = 10 * 1024**2
_COMMIT = re.compile("[0-9a-f]{40}")


def path_inside(folder: Path, name: str) -> Path | None:
    """The path of a file of a folder that anyone may have written; None where there is nothing of this name.

    A link may lead to another file of the folder or, from a snapshot of the Hub's cache, to the cache's own blobs. A
    git clone keeps links, and one that leads elsewhere would pass on a file of this machine as if it were the repo's.

    Raises:
        ValueError: it is no regular file, or a link that leaves the folder.
    """
    path = folder / name
    if not os.path.lexists(path):
        return None
    target = path.resolve()
    if not any(target.is_relative_to(root) for root in _link_roots(folder)):
        raise ValueError(f"{name} is a link that leaves the folder, to {target}")
    if not target.is_file():
        raise ValueError(f"{name} is not a regular file")
    return path


def _link_roots(folder: Path) -> list[Path]:
    """Where a file of `folder` may really lie: in it or, for `<cache>/<repo>/snapshots/<commit>` and what is below,
    among blobs."""
    folder = folder.resolve()
    for commit in (folder, *folder.parents):
        repo = commit.parent.parent
        if commit.parent.name == "snapshots" and _COMMIT.fullmatch(commit.name) and "--" in repo.name:
            return [folder, repo / "blobs", repo.parent / "blobs"]  # the last: shared by several repos
    return [folder]


def check_utf8(path: Path) -> None:
    """Raise `ValueError` where the path is not UTF-8: safetensors opens no such file."""
    try:
        os.fsencode(path).decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError("its path is not UTF-8, which safetensors needs; rename it") from None


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read its bytes.

    Raises:
        ValueError: it is a FIFO, a socket or a device, where a reader might wait forever or find no end.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise ValueError("it is not a regular file")


def read_text(path: Path, most: int = MAX_TEXT_BYTES) -> str:
    """The file as UTF-8. Raises `ValueError` where it is longer than `most` bytes."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise ValueError(f"{size} bytes, more than {most}")
        data = file.read(size + 1)
    if len(data) > size:
        raise ValueError("it grows while it is read")
    return data.decode("utf-8")


def check_file_name(name: str, what: str) -> None:
    """Refuse a name that the system would not look for as a folder."""
    longest = max(len(part.encode("utf-8", "surrogatepass")) for part in name.split("/"))
    if longest > 255 or len(name) > 2000 or "\0" in name:
        raise ValueError(f"{what} is no name of a folder or a repo: {name[:80]!r}... ({len(name)} characters)")
