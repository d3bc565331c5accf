"""Starting images: the right shares, the right range, the same ones again."""

import pytest
import torch

from lora_recycle.inversion.starts import PROCEDURES, draw_starts


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", PROCEDURES)
def test_images_are_pictures_and_repeat_with_the_seed(kind):
    one, same, other = (PROCEDURES[kind](3, 32, seeded(seed)) for seed in (0, 0, 1))
    assert one.shape == (3, 3, 32, 32) and one.dtype == torch.float32
    assert one.min() >= 0 and one.max() <= 1
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert (one.flatten(1).std(1) > 0.02).all()  # none is blank
    assert not torch.equal(one[0], one[1])


def test_noise_is_grey_on_average():
    images = PROCEDURES["noise"](20, 32, seeded())
    assert abs(images.mean().item() - 0.5) < 0.01 and abs(images.std().item() - 0.25) < 0.02


def test_fractals_are_smooth_and_noise_is_not():
    def roughness(images):
        return images.diff(dim=-1).std() / images.std()

    assert roughness(PROCEDURES["noise"](8, 32, seeded())) > 1.2
    assert roughness(PROCEDURES["fractal"](8, 32, seeded())) < 0.8


def test_pale_leaves_are_dead_leaves_at_half_the_contrast():
    leaves, pale = (PROCEDURES[kind](3, 32, seeded()) for kind in ("dead-leaves", "pale-leaves"))
    torch.testing.assert_close(pale - 0.5, (leaves - 0.5) / 2)


def test_strokes_are_grey():
    images = PROCEDURES["strokes"](4, 32, seeded())
    assert torch.equal(images[:, 0], images[:, 1]) and torch.equal(images[:, 0], images[:, 2])


def test_shares_are_met_and_mixed():
    stock = torch.full((2, 3, 8, 8), 255, dtype=torch.uint8)
    images = draw_starts({"noise": 1.0, "images": 3.0, "fractal": 0.0}, 40, 8, seeded(), stock)
    white = (images == 1).flatten(1).all(1)
    assert images.shape == (40, 3, 8, 8) and white.sum() == 30
    assert 0 < white[:10].sum() < 10  # not one kind after the other
    again = draw_starts({"noise": 1.0, "images": 3.0}, 40, 8, seeded(), stock)
    assert torch.equal(images, again)


def test_shares_smaller_than_an_image():
    images = draw_starts({"noise": 1.0, "fractal": 1e-6, "strokes": 1.0}, 3, 16, seeded())
    assert images.shape == (3, 3, 16, 16)
