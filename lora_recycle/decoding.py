"""Many pictures decoded by threads, in their order, of which only a few are in memory at a time."""

from __future__ import annotations

import collections
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from .errors import DataError
from .pictures import to_picture


#: Decoders let go of Python's lock; more than eight threads wait for the disk or for each other.
WORKERS = min(8, os.cpu_count() or 1)
#: Pictures that are decoded before they are asked for: the next batch, while the model computes.
AHEAD = 64

Converted = TypeVar("Converted")


def decoded(
    items: Iterable[tuple[str | None, Any]],
    convert: Callable[[Image.Image], Converted],
    at_least: int | None = None,
) -> Iterator[Converted | DataError]:
    """What `convert` makes of each picture, or the error that says why it cannot be read.

    Files and encoded bytes go through threads. Images in memory are converted here: PIL's objects must not be
    touched by two threads at once, and the same one may come twice.

    Args:
        items: what errors call each image, and the image in any form that [`pictures.to_picture`] takes.
        at_least: as [`pictures.to_picture`] takes it.
    """

    def attempt(where: str | None, image: Any) -> Converted | DataError:
        try:
            picture = to_picture(image, where, at_least)
        except DataError as error:
            return error
        return convert(picture)

    pending: collections.deque[Future[Converted | DataError] | Converted | DataError] = collections.deque()
    with ThreadPoolExecutor(WORKERS) as executor:
        try:
            for where, image in items:
                encoded = isinstance(image, (str, Path, bytes))
                pending.append(executor.submit(attempt, where, image) if encoded else attempt(where, image))
                if len(pending) > AHEAD:
                    yield _result(pending.popleft())
            while pending:
                yield _result(pending.popleft())
        finally:
            for waiting in pending:
                if isinstance(waiting, Future):
                    waiting.cancel()


def _result(pending: Future[Converted | DataError] | Converted | DataError) -> Converted | DataError:
    return pending.result() if isinstance(pending, Future) else pending
