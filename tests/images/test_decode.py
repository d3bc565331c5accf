"""Every form and mode of a picture, and every way in which a file can be broken."""

import io
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from lora_recycle.errors import DataError
from lora_recycle.images import decode, modes
from lora_recycle.images.decode import decoded, to_picture
from lora_recycle.images.sources import images_below


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def drawn(size=(24, 16)) -> Image.Image:
    image = Image.new("RGB", size, (200, 40, 90))
    ImageDraw.Draw(image).rectangle((2, 3, size[0] // 2, size[1] // 2), fill=(10, 220, 30))
    return image


def corner(image) -> tuple[int, ...]:
    return to_picture(image).getpixel((0, 0))


def test_a_turned_photo_stands_upright(tmp_path):
    image, exif = Image.new("RGB", (40, 20), "blue"), Image.Exif()
    image.paste("red", (0, 0, 10, 20))  # a red band on the left
    exif[0x0112] = 6  # to be turned by 90 degrees to the right: the band is at the top
    path = tmp_path / "turned.jpg"
    image.save(path, quality=95, exif=exif)
    upright = to_picture(path)
    assert upright.size == (20, 40)
    assert upright.getpixel((10, 3))[0] > 200 and upright.getpixel((10, 30))[2] > 200


def test_metadata_that_cannot_be_read_spoil_no_pixels():
    data = encoded(drawn(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert to_picture(data).size == (24, 16)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_what_is_transparent_shows_white(kind):
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.putpixel((1, 1), (255, 0, 0, 255))
    image.putpixel((2, 2), (0, 0, 0, 128))
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    found = to_picture(encoded(image, kind, **options))
    assert found.getpixel((0, 0)) == (255, 255, 255) and found.getpixel((1, 1)) == (255, 0, 0)
    assert found.getpixel((2, 2)) == (127, 127, 127)


def test_every_kind_of_transparency_shows_white():
    palette = Image.new("RGB", (4, 4), "red").quantize(4)
    assert corner(encoded(palette, "PNG", transparency=palette.getpixel((0, 0)))) == (255, 255, 255)
    assert corner(encoded(palette, "GIF", transparency=palette.getpixel((0, 0)))) == (255, 255, 255)
    assert corner(encoded(Image.new("RGB", (4, 4), (1, 2, 3)), "PNG", transparency=(1, 2, 3))) == (255, 255, 255)
    assert corner(encoded(Image.new("L", (4, 4), 7), "PNG", transparency=7)) == (255, 255, 255)
    assert corner(encoded(Image.new("LA", (4, 4), (0, 0)), "PNG")) == (255, 255, 255)
    for mode in ("RGBa", "La", "PA"):
        assert corner(Image.new(mode, (4, 4))) == (255, 255, 255)
    assert corner(encoded(Image.new("RGBA", (4, 4), (9, 8, 7, 255)), "PNG")) == (9, 8, 7)


def test_print_colours_become_screen_colours():
    cyan = encoded(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG", quality=95)
    red, green, blue = corner(cyan)
    assert red < 20 and green > 230 and blue > 230


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_files_keep_their_greys(kind):
    image = Image.fromarray(np.array([[0, 32896, 65535]], dtype=np.uint16))
    found = np.asarray(to_picture(encoded(image, kind)))
    assert found[0].tolist() == [[0] * 3, [128] * 3, [255] * 3]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 1, 255]], np.int32), [0, 1, 255]),
        (np.array([[-5, 300, 65535, 10**6]], np.int32), [0, 1, 255, 255]),
        (np.array([[0, 0.5, 1]], np.float32), [0, 128, 255]),
        (np.array([[np.nan, 100, 255]], np.float32), [0, 100, 255]),
    ],
)
def test_wide_values_are_scaled(values, expected):
    assert np.asarray(to_picture(Image.fromarray(values)))[0, :, 0].tolist() == expected


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_an_animation_is_its_first_frame(kind):
    frames = [Image.new("RGB", (12, 10), colour) for colour in ("red", "green", "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    with Image.open(io.BytesIO(data)) as opened:
        assert opened.n_frames == 3
    red, green, _ = corner(data)
    assert red > 240 and green < 20


def test_large_photos_are_read_at_a_size_near_the_one_they_are_resized_to():
    size = (1600, 1200)
    noise = np.random.default_rng(0).integers(0, 256, (75, 100, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC), "JPEG", quality=90)
    small, whole = to_picture(data, at_least=2 * 64), to_picture(data)
    assert whole.size == size and small.size == (200, 150)
    gap = np.abs(np.asarray(small.resize((64, 64)), np.int16) - np.asarray(whole.resize((64, 64)), np.int16))
    assert gap.mean() < 2
    assert to_picture(encoded(drawn((300, 100)), "JPEG"), at_least=128).size == (300, 100)


def test_a_bomb_is_refused_with_what_to_do(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match=r"row 3: not a readable image \(.*400 pixels.*PIL.Image.MAX_IMAGE_PIXELS"):
        to_picture(encoded(Image.new("L", (20, 20)), "PNG"), "row 3")


def test_a_bomb_in_text_is_refused():
    data = encoded(drawn(), "PNG")
    chunk = b"zTXt" + b"x\0\0" + zlib.compress(bytes(4 * 2**20))
    bomb = data[:33] + (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big") + data[33:]
    with pytest.raises(DataError, match="not a readable image"):
        to_picture(bomb)


def test_other_programs_are_not_started(tmp_path):
    postscript = tmp_path / "photo.jpg"
    postscript.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with Image.open(postscript) as opened:
        assert opened.format == "EPS"  # PIL alone would hand it to Ghostscript
    with pytest.raises(DataError, match="photo.jpg: not a readable image .*of no known picture format"):
        to_picture(postscript)


def test_file_urls_are_paths(tmp_path):
    path = tmp_path / "a photo.png"
    drawn().save(path)
    assert to_picture(path.as_uri()).tobytes() == to_picture(str(path)).tobytes() == drawn().tobytes()
    with pytest.raises(DataError, match="https://example.org/cat.jpg: images are read from this machine only"):
        to_picture("https://example.org/cat.jpg")
    with pytest.raises(DataError, match="this machine only"):
        to_picture("file://elsewhere/cat.jpg")


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((5, 8, 8), np.uint8), r"must be \(H, W\), \(H, W, channels\) or .*, got \(5, 8, 8\)"),
        (np.zeros((8, 8), np.uint16), "must be uint8 from 0 to 255 or floats from 0 to 1, got uint16"),
        (np.zeros((0, 8, 3), np.uint8), "no pixels"),
        (torch.full((3, 8, 8), -1.0), "must lie between 0 and 1, .*got -1 to -1.*Leave out Normalize"),
        (np.full((8, 8, 3), 255.0), "must lie between 0 and 1, .*got 255 to 255.*by 255"),
        (np.full((8, 8, 3), np.nan), "must lie between 0 and 1, .*got nan to nan"),
        (b"", "An image: not a readable image .empty, cut, or of no known"),
        (Image.new("L", (0, 4)), "no pixels"),
        (None, "No image can be read from a NoneType"),
    ],
)
def test_what_is_no_picture(image, message):
    with pytest.raises(DataError, match=message):
        to_picture(image)


def test_files_that_are_no_pictures(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    for name, message in (
        ("empty.png", "empty.png: not a readable image .empty, cut"),
        ("photo.heic", "photo.heic: not a readable image"),
        ("none.png", "none.png: not a readable image .No such file"),
        (".", "Is a directory"),
    ):
        with pytest.raises(DataError, match=message):
            to_picture(tmp_path / name)


def test_pictures_of_a_folder(tmp_path):
    for name in ("b.PNG", "a.jpeg", "deep/c.webp", "d.heic", "notes.txt", "paper.pdf", "drawing.eps", ".hidden.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [str(path.relative_to(tmp_path)) for path in images_below(tmp_path, "none")]
    assert found == [
        "a.jpeg",
        "b.PNG",
        "d.heic",
        "deep/c.webp",
    ]  # a photo that cannot be read is told, not passed over


SMALL = {
    "PNG": (drawn(), {}),
    "JPEG": (drawn(), {"quality": 80}),
    "GIF": (drawn().quantize(8), {}),
    "WEBP": (drawn(), {"lossless": True}),
    "TIFF": (drawn(), {"compression": "tiff_lzw"}),
    "BMP": (drawn(), {}),
    "JPEG2000": (drawn((32, 32)), {}),
}


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_file_is_an_error_of_ours_or_a_picture(kind):
    image, options = SMALL[kind]
    data, rng = encoded(image, kind, **options), np.random.default_rng(0)
    refused = 0
    for trial in range(120):
        broken = bytearray(data[: rng.integers(len(data))] if trial % 3 == 0 else data)
        for place in rng.integers(len(broken), size=0 if trial % 3 == 0 else rng.integers(1, 6)) if broken else ():
            broken[place] = rng.integers(256)
        try:
            found = to_picture(bytes(broken), "broken")
            assert found.mode == "RGB" and 0 not in found.size
        except DataError as error:
            refused += 1
            assert str(error).startswith("broken: not a readable image (")
    assert refused > 20


def test_half_a_file_is_refused_however_often_it_is_asked_for():
    image = Image.open(io.BytesIO(encoded(Image.effect_noise((60, 60), 90), "PNG")[:2000]))
    for _ in range(2):
        with pytest.raises(DataError, match="truncated"):
            to_picture(image)


def test_many_are_decoded_in_order_and_few_ahead(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "AHEAD", 5)
    for number in range(40):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number:02}.png")
    (tmp_path / "17.png").write_bytes(b"broken")
    asked, images = [], sorted(tmp_path.iterdir())

    def items():
        for number, path in enumerate(images):
            asked.append(number)
            yield None, path if number % 3 else Image.open(path) if number != 18 else images[0]

    most_ahead, found = 0, []
    for image in decoded(items(), lambda picture: picture.getpixel((0, 0))[0]):
        found.append(image)
        most_ahead = max(most_ahead, len(asked) - len(found))
    assert most_ahead == 5
    assert isinstance(found.pop(17), DataError) and found[17] == 0
    assert found[:17] + found[18:] == [number for number in range(40) if number not in (17, 18)]


def test_what_goes_wrong_in_our_own_code_is_not_called_a_broken_image(tmp_path):
    drawn().save(tmp_path / "sound.png")
    with pytest.raises(ZeroDivisionError):
        list(decoded([(None, tmp_path / "sound.png")], lambda picture: 1 / 0))


def test_one_large_picture_is_decoded_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(modes, "LARGE", 100)
    monkeypatch.setattr(decode, "WORKERS", 8)
    inside, most, original = [], [], decode.to_rgb

    def watched(image, at_least=None):
        inside.append(image)
        most.append(len(inside))
        found = original(image, at_least)
        inside.remove(image)
        return found

    monkeypatch.setattr(decode, "to_rgb", watched)
    for number in range(12):
        Image.effect_noise((200, 200), 90).save(tmp_path / f"{number}.png")
    paths = [(None, path) for path in tmp_path.iterdir()]
    assert len(list(decoded(paths, lambda picture: picture.size))) == 12 and max(most) == 1
