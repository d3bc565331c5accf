"""What is optimised: the parameters that an image is written in. All start at given images and return images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class MultiResolution(nn.Module):
    """Images as the sigmoid of a sum of maps of 4, 8, ... S pixels, upsampled: coarse structure moves first.

    Args:
        images: float (B, 3, S, S) in [0, 1], where the finest map starts.
    """

    def __init__(self, images: torch.Tensor):
        super().__init__()
        self.size = images.shape[-1]
        sizes = [s for s in (4, 8, 16, 32, 64, 128) if s < self.size]
        shape = (len(images), 3)
        self.maps = nn.ParameterList([nn.Parameter(images.new_zeros(*shape, s, s)) for s in sizes])
        self.maps.append(nn.Parameter(images.clamp(0.02, 0.98).logit()))

    def forward(self) -> torch.Tensor:
        total = self.maps[-1]
        for coarse in self.maps[:-1]:
            total = total + F.interpolate(coarse, size=(self.size,) * 2, mode="bilinear", align_corners=False)
        return total.sigmoid()


class Pixels(nn.Module):
    """The image itself, clipped to the valid range: the paper's own parameterisation."""

    def __init__(self, images: torch.Tensor):
        super().__init__()
        self.images = nn.Parameter(images.clone())

    def forward(self) -> torch.Tensor:
        return self.images + (self.images.clamp(0, 1) - self.images).detach()


PIXEL_SPACES = {"multires": MultiResolution, "pixels": Pixels}
