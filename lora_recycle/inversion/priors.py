"""Image priors R(x): each takes images (B, 3, H, W) in [0, 1] and the backbone's last tokens, and returns a scalar."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..backbones.backbone import Backbone
from .batch_norm import batch_norm_prior
from .config import InversionConfig


Prior = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def total_variation(images: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of neighbouring pixels, down and across, summed."""
    return images.diff(dim=-2).abs().mean() + images.diff(dim=-1).abs().mean()


def patch_similarity_entropy(patches: torch.Tensor, bandwidth: float = 0.05, points: int = 64) -> torch.Tensor:
    """Differential entropy of the cosine similarities between an image's patch tokens: (B, P, D) to (B,).

    Natural images have objects and ground, hence similarities spread wide; noise has one narrow peak. The density is a
    Gaussian kernel estimate on a grid (PSAQ-ViT, arXiv 2203.02250, eq. 6-8; there at every layer, here at the last).
    """
    patches = F.normalize(patches.float(), dim=-1)
    similarity = patches @ patches.transpose(1, 2)  # (B, P, P)
    rows, columns = torch.triu_indices(patches.shape[1], patches.shape[1], 1, device=patches.device)
    values = similarity[:, rows, columns]  # (B, P (P - 1) / 2)
    grid = torch.linspace(-1, 1, points, device=patches.device)
    kernel = torch.exp(-0.5 * ((values[..., None] - grid) / bandwidth) ** 2).mean(1)  # (B, points)
    density = kernel / (kernel.sum(-1, keepdim=True) * (grid[1] - grid[0]))
    return -(density * density.clamp_min(1e-8).log()).sum(-1) * (grid[1] - grid[0])


def build_priors(config: InversionConfig, backbone: Backbone) -> Prior:
    """The weighted sum of the priors that the settings name, for images of this backbone.

    Raises:
        ConfigError: the CNN of `batch_norm` is not installed, or its file is not what it must be.
    """
    terms: list[tuple[float, Prior]] = []
    prefix = backbone.num_prefix_tokens
    for name, weight in config.priors.items():
        if weight == 0:
            continue
        if name == "tv":
            terms.append((weight, lambda images, tokens: total_variation(images)))
        elif name == "patch_entropy":
            terms.append((weight, lambda _, tokens: -patch_similarity_entropy(tokens[:, prefix:]).mean()))
        elif name == "batch_norm":
            terms.append((weight, batch_norm_prior(config.cnn, backbone.image_size)))

    def total(images: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return sum((weight * term(images, tokens) for weight, term in terms), images.new_zeros(()))

    return total
