"""Preprocessing a batch at a time gives what the image processor gives image by image."""

import threading

import numpy as np
import pytest
import torch
from helpers_tiny import random_pixels, tiny_processor, tiny_vit
from PIL import Image
from transformers import CLIPImageProcessorPil, ViTImageProcessorPil

from lora_recycle.backbones.backbone import Backbone
from lora_recycle.errors import DataError
from lora_recycle.modeling.preprocessing import one_ahead, pixel_batches, to_pixel_values


STATISTICS = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3]}
SQUARE = {"size": {"height": 32, "width": 32}}
PROCESSORS = {
    "square": tiny_processor(),
    "bilinear": ViTImageProcessorPil(**SQUARE, **STATISTICS, resample=2),
    "crop": CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, **STATISTICS),
    "larger crop": CLIPImageProcessorPil(
        size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}, **STATISTICS
    ),
    "not normalised": ViTImageProcessorPil(**SQUARE, **STATISTICS, do_normalize=False),
    "other scale": ViTImageProcessorPil(**SQUARE, **STATISTICS, rescale_factor=1 / 127.5),
}


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    sizes = [(32, 32), (90, 40), (20, 25), (64, 64)]
    return [Image.fromarray(rng.integers(0, 256, (high, wide, 3), dtype=np.uint8)) for wide, high in sizes]


@pytest.mark.parametrize("name", PROCESSORS)
def test_equal_to_the_image_processor(name):
    backbone = Backbone(tiny_vit(), PROCESSORS[name], name)
    expected = PROCESSORS[name](images=pictures(), return_tensors="pt")["pixel_values"]
    found = to_pixel_values(pictures(), backbone)
    assert found.dtype == torch.float32 and found.shape == (4, 3, 32, 32)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PROCESSORS)
def test_tensors_of_the_right_size_are_treated_like_pictures(name):
    backbone, pixels = Backbone(tiny_vit(), PROCESSORS[name], name), random_pixels(3)
    images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]
    expected = PROCESSORS[name](images=images, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(to_pixel_values(pixels, backbone), expected, rtol=1e-5, atol=1e-5)


def test_tensors_that_are_no_images_are_refused():
    backbone = Backbone(tiny_vit(), tiny_processor(), "tiny")
    with pytest.raises(DataError, match="must be uint8 from 0 to 255 or floats from 0 to 1, got int64"):
        to_pixel_values(torch.zeros(2, 3, 32, 32, dtype=torch.int64), backbone)


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("size", [32, 40])
def test_floats_from_0_to_1_are_the_same_pixels_in_torch_and_numpy(name, size):
    backbone = Backbone(tiny_vit(), PROCESSORS[name], name)
    pixels = torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]
    expected = to_pixel_values(pictures, backbone)
    floats = pixels / 255  # as ToTensor gives them
    for images in (floats, list(floats), floats.half(), floats.double().numpy(), floats.permute(0, 2, 3, 1).numpy()):
        torch.testing.assert_close(to_pixel_values(images, backbone), expected)


@pytest.mark.parametrize("as_numpy", [False, True])
def test_floats_beyond_0_to_1_are_told_by_their_number_and_may_be_left_out(as_numpy):
    backbone, images = Backbone(tiny_vit(), tiny_processor(), "tiny"), torch.rand(4, 3, 32, 32)
    images[1], images[2, 0, 0, 0] = images[1] * 255, torch.nan
    expected = to_pixel_values(images[[0, 3]], backbone)
    given = images.permute(0, 2, 3, 1).numpy() if as_numpy else images
    with pytest.raises(DataError, match="image 1: .* as ToTensor gives them, got .*divide values up to 255 by 255"):
        to_pixel_values(given, backbone)
    failures = {}
    (found,) = pixel_batches(given, backbone, 8, failures)
    assert torch.equal(found, expected) and sorted(failures) == [1, 2]


def test_half_a_grey_level_of_rounding_is_no_other_scale():
    backbone, white = Backbone(tiny_vit(), tiny_processor(), "tiny"), torch.ones(1, 3, 32, 32)
    assert torch.equal(to_pixel_values(white * 1.001, backbone), to_pixel_values(white, backbone))
    with pytest.raises(DataError, match="got 1.01 to 1.01"):
        to_pixel_values(white * 1.01, backbone)


def test_the_next_batch_is_made_while_the_caller_is_at_one():
    """The caller holds a batch until the next one is there: without a thread of its own that never comes."""
    made = [threading.Event() for _ in range(4)]

    def items():
        for number, event in enumerate(made):
            event.set()
            yield number

    found = []
    for number in one_ahead(items()):
        assert number + 1 == len(made) or made[number + 1].wait(10)
        assert not any(event.is_set() for event in made[number + 2 :])  # and none further ahead
        found.append(number)
    assert found == [0, 1, 2, 3]


def test_errors_come_where_they_are_and_an_early_end_leaves_no_thread():
    def items():
        yield "first"
        raise DataError("second")

    batches, before = one_ahead(items()), threading.active_count()
    assert next(batches) == "first"
    with pytest.raises(DataError, match="second"):
        next(batches)
    endless = one_ahead(iter(lambda: 1, 2))
    assert next(endless) == 1
    endless.close()
    assert threading.active_count() == before


def test_many_files_in_small_batches_are_those_of_one_batch(tmp_path):
    backbone, paths = Backbone(tiny_vit(), PROCESSORS["square"], "square"), []
    for number, picture in enumerate(pictures() * 3):
        paths.append(tmp_path / f"{number}.png")
        picture.save(paths[-1])
    paths[5].write_bytes(b"cut")
    failures: dict[int, str] = {}
    parts = list(pixel_batches(paths, backbone, 4, failures))
    assert [len(part) for part in parts] == [4, 4, 3] and list(failures) == [5]
    assert torch.equal(torch.cat(parts), to_pixel_values(paths[:5] + paths[6:], backbone))
