"""Pictures of any PIL mode as upright 8-bit RGB, large ones a strip of rows at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
from PIL import Image


#: Longest side, and longest side over shortest: a resize by the shortest side would make a line endless.
MAX_SIDE, MAX_RATIO = 65_535, 200
#: Pixels from which on a picture is shrunk before it is converted, and those of one strip.
LARGE, _STRIP = 2**25, 2**22
_WITH_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")
_ORIENTATION = 0x0112
#: What turns a picture upright, by its EXIF orientation.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def check_sides(size: tuple[int, int]) -> None:
    """Raise `ValueError` where a picture has no pixels, or is so long that resizing it would cost gigabytes."""
    shortest, longest = min(size), max(size)
    if shortest < 1:
        raise ValueError(f"it has no pixels ({size[0]} x {size[1]})")
    if longest > MAX_SIDE or longest > MAX_RATIO * shortest:
        raise ValueError(
            f"it has {size[0]} x {size[1]} pixels; no side may have more than {MAX_SIDE}, or be more than {MAX_RATIO} "
            "times as long as the other. Crop it"
        )


def is_large(image: Image.Image) -> bool:
    """Whether it takes so much memory that only one such picture is decoded at a time."""
    return image.width * image.height > LARGE


def to_rgb(image: Image.Image, at_least: int | None = None) -> Image.Image:
    """Upright RGB of any PIL mode.

    What is transparent shows white. Grey values of 16 bits, and floating-point ones up to 1, are scaled to 0-255.
    Of an animation it is the frame that PIL stands at, the first one of an opened file.

    Args:
        at_least: sides that a picture of more than `LARGE` pixels keeps; it is shrunk by a whole number.
    """
    image.load()  # before anything else: a second attempt at a truncated file would pass, half empty
    check_sides(image.size)  # an icon tells the sides of the picture in it only now
    orientation = None
    with contextlib.suppress(Exception):  # metadata that cannot be read spoil no pixels
        orientation = image.getexif().get(_ORIENTATION)
    top = _white_level(image)
    rgb = _shrunk(image, top, max(1, min(image.size) // (at_least or 2**31))) if is_large(image) else _rgb(image, top)
    return rgb.transpose(_TURNS[orientation]) if orientation in _TURNS else rgb


def _shrunk(image: Image.Image, top: float, factor: int) -> Image.Image:
    """Each `factor` x `factor` pixels as their mean, without a copy of the whole picture in between."""
    result = Image.new("RGB", (-(-image.width // factor), -(-image.height // factor)))
    for row, strip in _strips(image, factor):
        result.paste(_rgb(strip, top).reduce(factor), (0, row // factor))
    return result


def _strips(image: Image.Image, factor: int = 1) -> Iterator[tuple[int, Image.Image]]:
    """The first row and the rows of each strip, a multiple of `factor` rows high."""
    if not is_large(image):
        yield 0, image
        return
    rows = max(1, _STRIP // (image.width * factor)) * factor
    for row in range(0, image.height, rows):
        yield row, image.crop((0, row, image.width, min(row + rows, image.height)))


def _rgb(image: Image.Image, top: float) -> Image.Image:
    if _has_wide_values(image):  # PIL would clip at 255: 16-bit X-rays would turn white
        values = np.nan_to_num(np.asarray(image, dtype=np.float32)).clip(0, top)
        image = Image.fromarray((values * (255.0 / top)).round().astype(np.uint8))
    elif image.mode in _WITH_ALPHA or ("transparency" in image.info and image.mode in ("1", "L", "P", "RGB")):
        image = _on_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _has_wide_values(image: Image.Image) -> bool:
    return image.mode.startswith("I") or image.mode == "F"


def _white_level(image: Image.Image) -> float:
    """The value that becomes 255."""
    if not _has_wide_values(image):
        return 255.0
    if image.mode.startswith("I;16"):
        return 65535.0
    least = 1.0 if image.mode == "F" else 255.0
    most = max(np.nan_to_num(np.asarray(strip, dtype=np.float32)).max(initial=0) for _, strip in _strips(image))
    return next(level for level in (least, 255.0, 65535.0) if most <= level or level == 65535.0)


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode == "La":  # PIL goes to RGBA from LA only
        image = image.convert("LA")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    return white
