"""One picture, in any form and mode that users keep it in, to upright RGB. Nothing in a file is trusted."""

from __future__ import annotations

import collections
import contextlib
import functools
import importlib.util
import io
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np
import torch
from PIL import Image

from ..errors import DataError, ImageError
from ..runtime.untrusted_files import open_regular
from .modes import check_sides, is_large, to_rgb


#: What is opened, where this Pillow knows it: formats that it decodes itself. For others, such as EPS, it starts
#: another program. HEIF comes with pillow-heif.
FORMATS = frozenset(
    ("AVIF", "BMP", "DIB", "GIF", "HEIF", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "TGA", "TIFF", "WEBP")
)
_HEIF_SUFFIXES = (".heic", ".heif")
_HALF_LEVEL = 0.5 / 255
#: Whatever the number of threads: memory stays bounded.
_one_large_picture = threading.Lock()


@functools.cache
def register_formats() -> None:
    """Let this Pillow know the formats of `FORMATS` that are installed, HEIF of pillow-heif among them."""
    Image.init()
    if importlib.util.find_spec("pillow_heif") is not None:
        import pillow_heif

        pillow_heif.register_heif_opener()


def image_suffixes() -> frozenset[str]:
    """Suffixes in lower case of the files that are images; HEIC too where it cannot be read, so that this is said."""
    register_formats()
    known = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}
    return frozenset(known).union(_HEIF_SUFFIXES)


def to_picture(image: Any, where: str | None = None, at_least: int | None = None) -> Image.Image:
    """One image in any form as upright RGB: PIL, an array or tensor ([`to_uint8`]), a path, a file:// URL, an encoded
    file as bytes or open for reading.

    Args:
        where: what errors call it; by default its path, where it has one.
        at_least: sides that the picture keeps. A JPEG may come at a half, a fourth or an eighth of its size, which
            decodes much faster, and a picture of more than `LARGE` pixels at a whole part of it.

    Raises:
        ImageError: it is damaged, empty, larger than Pillow's limit, too long, of no known format, no regular
            file, or no image at all.
    """
    if isinstance(image, (str, Path)):
        image = local_path(image)
    where = where or (str(image) if isinstance(image, Path) else None)
    try:
        if isinstance(image, (bytes, Path)):
            with io.BytesIO(image) if isinstance(image, bytes) else open_regular(image) as file:
                return _opened(file, at_least)
        if is_file(image):
            return _opened(image, at_least)
        image = _from_pixels(image)
        check_sides(image.size)
        return to_rgb(image, at_least)
    except DataError as error:
        raise ImageError(str(error) if where is None else f"{where}: {error}") from None
    except Exception as error:  # decoders of damaged files raise nearly anything
        raise ImageError(f"{where or 'An image'}: not a readable image ({_reason(error, image)}).") from error


def is_file(image: Any) -> bool:
    """Whether it is open for reading, as `io.BytesIO` and uploads of web frameworks are."""
    return callable(getattr(image, "read", None)) and not isinstance(image, (Image.Image, Path))


def _opened(file: BinaryIO, at_least: int | None) -> Image.Image:
    register_formats()
    with Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN]) as opened:
        check_sides(opened.size)
        if at_least is not None:
            opened.draft(None, (at_least, at_least))
        with _one_large_picture if is_large(opened) else contextlib.nullcontext():
            return to_rgb(opened, at_least)


def to_uint8(pixels: torch.Tensor) -> torch.Tensor:
    """The one rule for numbers that are pixels: uint8 as they are, floats from 0 to 1, as ToTensor gives them, times
    255. The same for tensors and arrays, whatever their shape.

    Raises:
        DataError: numbers of another type, NaN, or floats beyond 0 to 1, which may be normalised or up to 255.
    """
    if pixels.dtype == torch.uint8:
        return pixels
    if not pixels.is_floating_point():
        kind = str(pixels.dtype).removeprefix("torch.")
        raise DataError(f"Pixels must be uint8 from 0 to 255 or floats from 0 to 1, got {kind}.")
    pixels = pixels.float()
    # half a grey level of rounding is no other scale; NaN is not within
    if not ((pixels >= -_HALF_LEVEL) & (pixels <= 1 + _HALF_LEVEL)).all():
        raise DataError(
            f"Pixels that are floats must lie between 0 and 1, as ToTensor gives them, got {pixels.min():.4g} to "
            f"{pixels.max():.4g}. Leave out Normalize, which the model does itself; divide values up to 255 by 255. "
            "Normalised images are for forward(support_pixel_values=...) and features() alone."
        )
    return (pixels * 255).round().clamp(0, 255).to(torch.uint8)


def _from_pixels(image: Any) -> Image.Image:
    if isinstance(image, (torch.Tensor, np.ndarray)):
        image = _array_to_picture(image)
    if not isinstance(image, Image.Image):
        raise DataError(f"No image can be read from a {type(image).__name__}: pass PIL images, arrays or paths.")
    return image


def _array_to_picture(image: torch.Tensor | np.ndarray) -> Image.Image:
    """A grey image (H, W), or one with its channels last or first; where both could be, as torch and NumPy have it."""
    # a copy of an array: PIL's are read-only, of which torch warns
    pixels = image.detach().cpu() if isinstance(image, torch.Tensor) else torch.from_numpy(np.array(image))
    array = to_uint8(pixels).numpy()
    if array.ndim == 3:
        first, last = array.shape[0] in (1, 3), array.shape[-1] in (1, 2, 3, 4)
        array = array.transpose(1, 2, 0) if first and (isinstance(image, torch.Tensor) or not last) else array
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (1, 2, 3, 4)):
        raise DataError(f"Pixels must be (H, W), (H, W, channels) or (channels, H, W), got {tuple(array.shape)}.")
    return Image.fromarray(array.squeeze(-1) if array.ndim == 3 and array.shape[-1] == 1 else array)


def _reason(error: Exception, image: Any) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if "HEIF" not in Image.OPEN and isinstance(image, Path) and image.suffix.lower() in _HEIF_SUFFIXES:
        return "HEIC needs pillow-heif: pip install 'lora-recycle[heic]', or save it as JPEG"
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
