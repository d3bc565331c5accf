"""Priors worked out by hand."""

import math

import pytest
import torch
from helpers_tiny import planted_adapter, tiny_backbone
from torch import nn

from lora_recycle.adapters.heads import Head
from lora_recycle.errors import ConfigError
from lora_recycle.inversion import priors
from lora_recycle.inversion.batch import InversionBatch, Objective
from lora_recycle.inversion.config import InversionConfig
from lora_recycle.inversion.priors import BatchNormPrior, build_priors, patch_similarity_entropy, total_variation
from lora_recycle.runtime.launch import mixed_precision


def test_total_variation_by_hand():
    image = torch.tensor([[0.0, 1.0], [0.0, 0.0]]).expand(1, 3, 2, 2)
    # down: |0-0|, |0-1| -> mean 0.5; across: |1-0|, |0-0| -> mean 0.5
    assert total_variation(image).item() == pytest.approx(1.0)
    assert total_variation(torch.full((2, 3, 4, 4), 0.7)).item() == 0


def test_entropy_of_one_peak_is_that_of_the_kernel():
    orthogonal = torch.eye(16)[None]  # every similarity is 0
    expected = 0.5 * math.log(2 * math.pi * math.e * 0.05**2)
    assert patch_similarity_entropy(orthogonal).item() == pytest.approx(expected, abs=1e-3)


def test_entropy_is_larger_for_spread_similarities():
    angles = torch.linspace(0, math.pi, 16)
    spread = torch.stack([angles.cos(), angles.sin()], -1)
    two_kinds = torch.eye(2).repeat_interleave(8, 0)
    low, middle, high = patch_similarity_entropy(torch.stack([torch.ones(16, 2), two_kinds, spread])).tolist()
    assert low < middle < high < math.log(2) + 1e-3  # nothing on [-1, 1] spreads wider than evenly


def test_entropy_does_not_depend_on_the_length_of_tokens():
    tokens = torch.randn(2, 9, 8)
    torch.testing.assert_close(patch_similarity_entropy(tokens), patch_similarity_entropy(tokens * 7))


def matched_prior(images):
    """A batch-norm prior whose running statistics are those of `images`."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.BatchNorm2d(2))
    x = (images - 0.5) / 0.25
    for layer in network.eval().requires_grad_(False):
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.copy_(x.mean((0, 2, 3)))
            layer.running_var.copy_(x.var((0, 2, 3)))
        x = layer(x)
    return BatchNormPrior(network, [0.5] * 3, [0.25] * 3, size=images.shape[-1])


def test_batch_norm_prior_is_zero_where_statistics_match():
    images = torch.rand(4, 3, 16, 16)
    prior = matched_prior(images)
    images = images.requires_grad_()
    value = prior(images, torch.empty(0))
    assert value.item() == pytest.approx(0, abs=1e-4)
    value.backward()
    assert images.grad.isfinite().all()
    darker = prior(images.detach() * 0.5, torch.empty(0))
    assert darker.item() > 0.5
    assert prior(images.detach(), torch.empty(0)).item() == pytest.approx(value.item())  # nothing piles up


def test_batch_norm_prior_resizes_and_has_a_gradient():
    prior = matched_prior(torch.rand(4, 3, 16, 16))
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    prior(images, torch.empty(0)).backward()
    assert images.grad.isfinite().all() and images.grad.abs().sum() > 0


@pytest.mark.parametrize("parameterization", ["multires", "pixels"])
def test_images_may_leave_a_batch_whose_prior_saw_them(monkeypatch, parameterization):
    """The prior held the graph of the step before, whose gradients have the shape of the larger batch."""
    monkeypatch.setattr(priors, "efficientnet_lite0", lambda: matched_prior(torch.rand(4, 3, 16, 16)))
    config = InversionConfig(priors={"tv": 0.1, "batch_norm": 0.01}, parameterization=parameterization, jitter=0)
    backbone = tiny_backbone()
    adapter = planted_adapter("a", {})
    adapter.head = Head(torch.randn(2, 32))
    objective = Objective(backbone, adapter, config, build_priors(config.priors, 1), mixed_precision())
    batch = InversionBatch(objective, torch.rand(3, 3, 32, 32), torch.tensor([0, 1, 0]), torch.Generator())
    batch.step()
    batch.keep(torch.tensor([True, False, True]))
    assert batch.step().isfinite() and batch.pixels().shape == (2, 3, 32, 32)


def test_a_network_without_batch_norm_is_refused():
    with pytest.raises(ConfigError, match="BatchNorm2d"):
        BatchNormPrior(nn.Conv2d(3, 4, 3), [0.5] * 3, [0.5] * 3, 16)


def test_priors_are_summed_with_their_weights():
    images, tokens = torch.rand(2, 3, 8, 8), torch.randn(2, 11, 8)
    both = build_priors({"tv": 2.0, "patch_entropy": 0.5}, num_prefix_tokens=2)(images, tokens)
    expected = 2 * total_variation(images) - 0.5 * patch_similarity_entropy(tokens[:, 2:]).mean()
    torch.testing.assert_close(both, expected)
    assert build_priors({"tv": 0.0}, 1)(images, tokens).item() == 0
    assert build_priors({}, 1)(images, tokens).item() == 0


def test_an_unknown_prior_is_refused():
    with pytest.raises(ConfigError, match="priors: 'gan' is unknown; choose from tv, patch_entropy, batch_norm"):
        InversionConfig(priors={"gan": 1.0})
