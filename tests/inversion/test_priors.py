"""Priors worked out by hand."""

import math
from types import SimpleNamespace

import pytest
import torch

from lora_recycle.errors import ConfigError
from lora_recycle.inversion.config import InversionConfig
from lora_recycle.inversion.priors import build_priors, patch_similarity_entropy, total_variation


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


def priors_of(weights):
    return build_priors(InversionConfig(priors=weights), SimpleNamespace(num_prefix_tokens=2, image_size=8))


def test_priors_are_summed_with_their_weights():
    images, tokens = torch.rand(2, 3, 8, 8), torch.randn(2, 11, 8)
    both = priors_of({"tv": 2.0, "patch_entropy": 0.5})(images, tokens)
    expected = 2 * total_variation(images) - 0.5 * patch_similarity_entropy(tokens[:, 2:]).mean()
    torch.testing.assert_close(both, expected)
    assert priors_of({"tv": 0.0})(images, tokens).item() == 0
    assert priors_of({})(images, tokens).item() == 0


def test_an_unknown_prior_is_refused():
    with pytest.raises(ConfigError, match="priors: 'gan' is unknown; choose from tv, patch_entropy, batch_norm"):
        InversionConfig(priors={"gan": 1.0})
