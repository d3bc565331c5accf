"""One picture, in any form and mode that users keep it in, to upright RGB. Nothing in a file is trusted."""

from __future__ import annotations

import collections
import contextlib
import io
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np
import torch
from PIL import Image, ImageOps

from ..errors import DataError


#: What is opened, where this Pillow knows it: formats that it decodes itself. For others, such as EPS, it starts
#: another program. HEIF comes with pillow-heif.
FORMATS = frozenset(
    ("AVIF", "BMP", "DIB", "GIF", "HEIF", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "TGA", "TIFF", "WEBP")
)
_WITH_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")
#: Pixels from which on one picture is decoded at a time, whatever the number of threads: memory stays bounded.
_LARGE = 2**25
_one_large_picture = threading.Lock()


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright RGB of any PIL mode.

    What is transparent shows white. Grey values of 16 bits, and floating-point ones up to 1, are scaled to 0-255.
    Of an animation it is the frame that PIL stands at, the first one of an opened file.
    """
    image.load()  # before anything else: a second attempt at a truncated file would pass, half empty
    with contextlib.suppress(Exception):  # metadata that cannot be read spoil no pixels
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":  # PIL would clip at 255: 16-bit X-rays would turn white
        image = _in_bytes(image)
    elif image.mode in _WITH_ALPHA or ("transparency" in image.info and image.mode in ("1", "L", "P", "RGB")):
        image = _on_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _in_bytes(image: Image.Image) -> Image.Image:
    values = np.nan_to_num(np.asarray(image, dtype=np.float32))
    most = 65535 if image.mode.startswith("I;16") else values.max(initial=0)
    least = 1.0 if image.mode == "F" else 255.0
    top = next(top for top in (least, 255.0, 65535.0) if most <= top or top == 65535.0)
    return Image.fromarray((values.clip(0, top) * (255.0 / top)).round().astype(np.uint8))


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode == "La":  # PIL goes to RGBA from LA only
        image = image.convert("LA")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    return white


def to_picture(image: Any, where: str | None = None, at_least: int | None = None) -> Image.Image:
    """One image in any form as upright RGB: PIL, an array or uint8 tensor, a path, a file:// URL, an encoded file.

    Args:
        where: what errors call it; by default its path, where it has one.
        at_least: a JPEG whose sides are both 2, 4 or 8 times as long may come smaller, which decodes much faster.

    Raises:
        DataError: it is damaged, empty, larger than Pillow's limit, of no known format, or no image at all.
    """
    if isinstance(image, (str, Path)):
        image = local_path(image)
    where = where or (str(image) if isinstance(image, Path) else None)
    try:
        if isinstance(image, (bytes, Path)):
            return _opened(io.BytesIO(image) if isinstance(image, bytes) else image, at_least)
        image = _from_pixels(image)
        if 0 in image.size:
            raise DataError(f"it has no pixels ({image.width} x {image.height})")
        return to_rgb(image)
    except DataError as error:
        if where is None:
            raise
        raise DataError(f"{where}: {error}") from None
    except Exception as error:  # decoders of damaged files raise nearly anything
        raise DataError(f"{where or 'An image'}: not a readable image ({_reason(error, image)}).") from error


def _opened(file: Path | io.BytesIO, at_least: int | None) -> Image.Image:
    Image.init()
    with Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN]) as opened:
        if at_least is not None:
            opened.draft(None, (at_least, at_least))
        large = opened.width * opened.height > _LARGE
        with _one_large_picture if large else contextlib.nullcontext():
            return to_rgb(opened)


def _from_pixels(image: Any) -> Image.Image:
    if isinstance(image, torch.Tensor):
        channels_first = image.ndim == 3 and image.shape[0] in (1, 3)
        image = (image.permute(1, 2, 0) if channels_first else image).detach().cpu().numpy()
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise DataError(f"Arrays of pixels must be uint8, got {image.dtype}; scale to 0-255 first.")
        if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[-1] not in (1, 2, 3, 4)):
            raise DataError(f"Arrays of pixels must be (H, W) or (H, W, channels), got {image.shape}.")
        image = Image.fromarray(image.squeeze(-1) if image.ndim == 3 and image.shape[-1] == 1 else image)
    if not isinstance(image, Image.Image):
        raise DataError(f"No image can be read from a {type(image).__name__}: pass PIL images, arrays or paths.")
    return image


def _reason(error: Exception, image: Any) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(image, Path) and image.suffix.lower() in (".heic", ".heif"):
        return "HEIC needs the package pillow-heif and its register_heif_opener(); or save it as JPEG"
    if isinstance(error, Image.DecompressionBombError):
        return f"{error} Make it smaller, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it"
    if isinstance(error, Image.UnidentifiedImageError):
        return "empty, cut, or of no known picture format"
    return " ".join(str(error).split()) or type(error).__name__


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
        items: what errors call each image, and the image in any form that [`images.decode.to_picture`] takes.
        at_least: as [`images.decode.to_picture`] takes it.
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


def local_path(name: str | Path) -> Path:
    """A path, or what a file:// URL leads to. Raises `DataError` for other URLs."""
    if isinstance(name, Path) or "://" not in name:
        return Path(name).expanduser()
    url = urlsplit(name)
    if url.scheme != "file" or url.netloc not in ("", "localhost"):
        raise DataError(f"{name}: images are read from this machine only. Download it and pass the file.")
    return Path(url2pathname(url.path))
