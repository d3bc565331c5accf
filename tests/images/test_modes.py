"""Small files that would cost gigabytes: pictures of absurd sides, and large ones of wide modes."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from lora_recycle.errors import DataError
from lora_recycle.images import modes
from lora_recycle.images.decode import decoded, to_picture


def png_header(width: int, height: int) -> bytes:
    """A PNG of 8-bit greys, of which only the sides are told."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(100_000_000, 1), (1, 70_000), (201, 1), (66_000, 1_000)])
def test_a_line_is_refused_before_it_is_decoded(size):
    (found,) = decoded([("row 7", png_header(*size))], lambda picture: picture)
    assert isinstance(found, DataError)
    assert str(found).startswith(f"row 7: not a readable image (it has {size[0]} x {size[1]} pixels; no side may")


def test_a_line_in_memory_is_refused():
    with pytest.raises(DataError, match="it has 900 x 1 pixels"):
        to_picture(Image.new("L", (900, 1)))
    assert to_picture(Image.new("L", (200, 1))).size == (200, 1)


def pictures() -> dict[str, Image.Image]:
    noise = np.random.default_rng(0)
    found = {
        mode: Image.fromarray(noise.integers(0, 256, (37, 50, len(mode)), dtype=np.uint8).squeeze(), mode)
        for mode in ("L", "LA", "RGB", "RGBA", "CMYK")
    }
    found["P"] = found["RGB"].quantize(16)
    found["P with transparency"] = found["P"].copy()
    found["P with transparency"].info["transparency"] = 3
    found["1"] = found["L"].convert("1")
    found["I;16"] = Image.fromarray(noise.integers(0, 65536, (37, 50), dtype=np.uint16))
    found["I"] = Image.fromarray(noise.integers(0, 900, (37, 50), dtype=np.int32))
    found["F"] = Image.fromarray(noise.random((37, 50), dtype=np.float32) * 200)
    return found


@pytest.mark.parametrize("name", pictures())
def test_strips_give_what_the_whole_gives(name, monkeypatch):
    image = pictures()[name]
    whole = modes.to_rgb(image)
    monkeypatch.setattr(modes, "LARGE", 100)
    monkeypatch.setattr(modes, "_STRIP", 400)
    assert modes.to_rgb(image).tobytes() == whole.tobytes()
    small = modes.to_rgb(image, at_least=12)
    assert small.size == (17, 13) and small.tobytes() == whole.reduce(3).tobytes()


@pytest.mark.parametrize("name", ["I;16", "F", "RGBA"])
def test_no_more_than_a_strip_is_converted_at_a_time(name, monkeypatch):
    monkeypatch.setattr(modes, "LARGE", 100)
    monkeypatch.setattr(modes, "_STRIP", 400)
    pixels, original = [], modes._rgb

    def watched(image, top):
        pixels.append(image.width * image.height)
        return original(image, top)

    monkeypatch.setattr(modes, "_rgb", watched)
    modes.to_rgb(pictures()[name])
    assert sum(pixels) == 37 * 50 and max(pixels) <= 400


def test_a_large_photo_is_shrunk_and_stands_upright(monkeypatch):
    monkeypatch.setattr(modes, "LARGE", 100)
    image, exif, buffer = Image.new("RGB", (40, 20), "blue"), Image.Exif(), io.BytesIO()
    image.paste("red", (0, 0, 10, 20))
    exif[0x0112] = 6  # to be turned by 90 degrees to the right: the red band is at the top
    image.save(buffer, "PNG", exif=exif)
    upright = to_picture(buffer.getvalue(), at_least=10)
    assert upright.size == (10, 20)
    assert upright.getpixel((5, 1)) == (255, 0, 0) and upright.getpixel((5, 18)) == (0, 0, 255)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_as_pil_does(orientation):
    from PIL import ImageOps

    image, exif, buffer = pictures()["RGB"], Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    image.save(buffer, "PNG", exif=exif)
    assert to_picture(buffer.getvalue()).tobytes() == ImageOps.exif_transpose(Image.open(buffer)).tobytes()


def test_what_never_ends_is_no_picture(tmp_path):
    os.mkfifo(tmp_path / "photo.png")  # who opens it to read waits for a writer
    with pytest.raises(DataError, match="photo.png: not a readable image .it is not a regular file"):
        to_picture(tmp_path / "photo.png")
    with pytest.raises(DataError, match="/dev/zero: not a readable image .it is not a regular file"):
        to_picture("/dev/zero")
