"""What an image is written in. All start at given images, return images, and stay in range after every step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class MultiResolution(nn.Module):
    """Images as the sigmoid of a sum of maps of 4, 8, ... S pixels, upsampled: coarse structure moves first.

    Args:
        images: float (B, 3, S, S) in [0, 1], where the finest map starts.
        std: not used: the sigmoid has its own scale.
    """

    def __init__(self, images: torch.Tensor, std: torch.Tensor):
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

    def project(self) -> None:
        """Nothing to do: a sigmoid is in range."""


class Pixels(nn.Module):
    """The pixels themselves in units of the backbone's normalisation, cut to the valid range after every step.

    The parameterisation of LoRA Recycle: Adam moves normalised pixels, so that a step of `lr` moves a pixel of [0, 1]
    by `lr` x std.

    Args:
        images: float (B, 3, S, S) in [0, 1].
        std: (1, 3, 1, 1), the standard deviations that the backbone divides by.
    """

    def __init__(self, images: torch.Tensor, std: torch.Tensor):
        super().__init__()
        self.std = std
        self.latent = nn.Parameter(images / std)

    def forward(self) -> torch.Tensor:
        return self.latent * self.std

    @torch.no_grad()
    def project(self) -> None:
        self.latent.copy_(torch.minimum(self.latent.clamp_min(0), 1 / self.std))


#: by their name in the settings
PIXEL_SPACES: dict[str, type[MultiResolution] | type[Pixels]] = {"multires": MultiResolution, "pixels": Pixels}
