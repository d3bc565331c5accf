"""Parameterisations: where they start, how far a step goes, and that no image leaves the range."""

import pytest
import torch
from helpers_tiny import planted_adapter, tiny_backbone

from lora_recycle.adapters.heads import Head
from lora_recycle.inversion.batch import InversionBatch, Objective
from lora_recycle.inversion.config import InversionConfig
from lora_recycle.inversion.pixel_spaces import PIXEL_SPACES, MultiResolution, Pixels
from lora_recycle.inversion.priors import build_priors
from lora_recycle.runtime.launch import mixed_precision


STD = torch.tensor([0.2, 0.25, 0.5]).view(1, 3, 1, 1)


@pytest.mark.parametrize("space", PIXEL_SPACES.values())
def test_they_start_at_the_image(space):
    images = torch.rand(2, 3, 32, 32) * 0.9 + 0.05
    torch.testing.assert_close(space(images, STD)(), images)


def test_maps_double_in_size():
    assert [m.shape[-1] for m in MultiResolution(torch.rand(1, 3, 32, 32), STD).maps] == [4, 8, 16, 32]


def test_a_projected_pixel_is_at_the_bound_and_keeps_its_gradient():
    space = Pixels(torch.full((1, 3, 1, 2), 0.5), STD)
    with torch.no_grad():
        space.latent[..., 0] += 10  # beyond 1 in every channel
        space.latent[..., 1] -= 10
    space.project()
    torch.testing.assert_close(space(), torch.tensor([1.0, 0.0]).expand(1, 3, 1, 2))
    space().sum().backward()
    torch.testing.assert_close(space.latent.grad, STD.expand(1, 3, 1, 2))  # clipped pixels can come back


def test_a_step_is_counted_in_units_of_the_standard_deviation():
    """Adam's first step moves every number by its learning rate: 0.1 here, of normalised pixels."""
    space = Pixels(torch.full((1, 3, 2, 2), 0.5), STD)
    optimizer = torch.optim.Adam(space.parameters(), lr=0.1)
    (-space().sum()).backward()
    optimizer.step()
    space.project()
    expected = torch.tensor([0.5 + 0.1 * std for std in (0.2, 0.25, 0.5)]).view(1, 3, 1, 1)
    torch.testing.assert_close(space(), expected.expand(1, 3, 2, 2), rtol=1e-5, atol=1e-6)


def test_the_papers_step_in_normalised_pixels_is_the_same():
    """The paper's own order, written out: Adam on (x - mean) / std, then a cut to the range of each channel."""
    torch.manual_seed(0)
    images, target, mean = torch.rand(2, 3, 4, 4), torch.randn(2, 3, 4, 4), 0.4
    space, theirs = Pixels(images, STD), ((images - mean) / STD).requires_grad_()
    mine = torch.optim.Adam(space.parameters(), lr=0.25, betas=(0.5, 0.99))
    other = torch.optim.Adam([theirs], lr=0.25, betas=(0.5, 0.99))
    for _ in range(30):
        for optimizer, pixels in ((mine, lambda: (space() - mean) / STD), (other, lambda: theirs)):
            optimizer.zero_grad()
            (pixels() - 5 * target).square().sum().backward()
            optimizer.step()
        space.project()
        with torch.no_grad():
            theirs.copy_(torch.max(torch.min(theirs, (1 - mean) / STD), -mean / STD))
    torch.testing.assert_close((space() - mean) / STD, theirs.detach(), rtol=1e-4, atol=1e-4)
    assert (space() == 0).any() and ((space() - 1).abs() < 1e-6).any()  # the bounds were at work


@pytest.mark.parametrize("parameterization", PIXEL_SPACES)
def test_images_are_in_range_after_every_step(parameterization):
    config = InversionConfig(parameterization=parameterization, lr=3.0, jitter=0, priors={})
    backbone, adapter = tiny_backbone(), planted_adapter("a", {})
    adapter.head = Head(torch.randn(2, 32))
    objective = Objective(backbone, adapter, config, build_priors(config, backbone), mixed_precision())
    batch = InversionBatch(objective, torch.rand(2, 3, 32, 32), torch.tensor([0, 1]), torch.Generator())
    for _ in range(5):
        batch.step()
        images = batch.space().detach()
        assert images.min() >= 0 and images.max() <= 1 + 1e-6
    with torch.no_grad():
        moved = (batch.space() - images).abs().max()
    assert moved == 0  # what is projected is what is stored, not a view of it
