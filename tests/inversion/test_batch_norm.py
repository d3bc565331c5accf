"""The batch-norm prior by hand, at every size, and of every CNN that it takes."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers_tiny import planted_adapter, tiny_backbone
from safetensors.torch import save_file
from torch import nn
from transformers import ResNetConfig, ResNetModel

from lora_recycle.adapters.heads import Head
from lora_recycle.errors import ConfigError
from lora_recycle.inversion import priors
from lora_recycle.inversion.batch import InversionBatch, Objective
from lora_recycle.inversion.batch_norm import BatchNormPrior, batch_norm_prior, load_resnet
from lora_recycle.inversion.config import InversionConfig
from lora_recycle.inversion.inverter import LoRAInverter
from lora_recycle.inversion.priors import build_priors
from lora_recycle.runtime.launch import mixed_precision


NOTHING = torch.empty(0)


def matched_prior(images, **options):
    """A batch-norm prior whose running statistics are those of `images`."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.BatchNorm2d(2))
    x = (images - 0.5) / 0.25
    for layer in network.eval().requires_grad_(False):
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.copy_(x.mean((0, 2, 3)))
            layer.running_var.copy_(x.var((0, 2, 3), correction=0))
        x = layer(x)
    return BatchNormPrior(network, [0.5] * 3, [0.25] * 3, **{"size": images.shape[-1], **options})


def test_by_hand():
    """Two channels of statistics (0, 4) and (3, 9), whose images have means 2 and 3, variances 1 and 0."""
    norm = nn.BatchNorm2d(2)
    norm.running_mean.copy_(torch.tensor([0.0, 3.0]))
    norm.running_var.copy_(torch.tensor([4.0, 9.0]))
    network = nn.Sequential(nn.Conv2d(3, 2, 1, bias=False), norm)
    network[0].weight.data = torch.tensor([[1.0, 0, 0], [0, 1, 0]]).view(2, 3, 1, 1)
    prior = BatchNormPrior(network, [0.0] * 3, [1.0] * 3, size=2)
    images = torch.tensor([[[1.0, 3], [1, 3]], [[3, 3], [3, 3]], [[0, 0], [0, 0]]])[None]
    gaps = math.hypot(2 - 0, 3 - 3) + math.hypot(1 - 4, 0 - 9)
    scale = math.hypot(2, 3) + math.hypot(4, 9)
    assert prior.scale == pytest.approx(scale) and prior(images, NOTHING).item() == pytest.approx(gaps / scale)


def test_zero_where_statistics_match():
    images = torch.rand(4, 3, 16, 16)
    prior = matched_prior(images)
    images = images.requires_grad_()
    value = prior(images, NOTHING)
    assert value.item() == pytest.approx(0, abs=1e-4)
    value.backward()
    assert images.grad.isfinite().all()
    darker = prior(images.detach() * 0.5, NOTHING)
    assert darker.item() > 0.2
    assert prior(images.detach(), NOTHING).item() == pytest.approx(value.item())  # nothing piles up


def test_as_many_copies_of_a_layer_weigh_what_one_does():
    """Depth and width: the plain sum grows with both."""
    images, values = torch.rand(4, 3, 8, 8) * 0.3, []
    for copies in (1, 6):
        norms = [nn.BatchNorm2d(3) for _ in range(copies)]  # in evaluation mode, weight 1 and bias 0: the identity
        for norm in norms:
            norm.eps = 0.0
        values.append(BatchNormPrior(nn.Sequential(*norms), [0.0] * 3, [1.0] * 3, 8)(images, NOTHING).item())
    assert values[0] == pytest.approx(values[1], rel=1e-5)


@pytest.mark.parametrize("size", [32, 224, 518])
def test_every_pixel_has_a_gradient_at_every_size(size):
    """Without antialiasing a third of the pixels had one at 224, and 6% at 518, where the CNN saw 64."""
    prior = matched_prior(torch.rand(1, 3, 16, 16))
    images = torch.rand(1, 3, size, size, requires_grad=True)
    prior(images, NOTHING).backward()
    assert (images.grad != 0).float().mean() > 0.999
    plain = torch.rand(1, 3, size, size, requires_grad=True)
    F.interpolate(plain, size=(16, 16), mode="bilinear", align_corners=False).square().sum().backward()
    assert (plain.grad != 0).float().mean() < 0.3 or size == 32  # what was lost


@pytest.mark.parametrize(("image_size", "expected"), [(64, 64), (224, 224), (518, 224)])
def test_the_size_is_that_of_the_backbone(monkeypatch, image_size, expected):
    monkeypatch.setattr("lora_recycle.inversion.batch_norm._efficientnet_lite0", lambda: nn.BatchNorm2d(3))
    assert batch_norm_prior("efficientnet-lite0", image_size).size == expected


def test_one_image_that_shrinks_to_one_number_has_a_finite_prior():
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3))
    images = torch.rand(1, 3, 8, 8, requires_grad=True)
    BatchNormPrior(network, [0.5] * 3, [0.25] * 3, 8)(images, NOTHING).backward()
    assert images.grad.isfinite().all()


@pytest.mark.parametrize("parameterization", ["multires", "pixels"])
def test_images_may_leave_a_batch_whose_prior_saw_them(monkeypatch, parameterization):
    """The prior held the graph of the step before, whose gradients have the shape of the larger batch."""
    monkeypatch.setattr(priors, "batch_norm_prior", lambda cnn, size: matched_prior(torch.rand(4, 3, 16, 16)))
    config = InversionConfig(priors={"tv": 0.1, "batch_norm": 0.01}, parameterization=parameterization, jitter=0)
    backbone = tiny_backbone()
    adapter = planted_adapter("a", {})
    adapter.head = Head(torch.randn(2, 32))
    objective = Objective(backbone, adapter, config, build_priors(config, backbone), mixed_precision())
    batch = InversionBatch(objective, torch.rand(3, 3, 32, 32), torch.tensor([0, 1, 0]), torch.Generator())
    batch.step()
    batch.keep(torch.tensor([True, False, True]))
    assert batch.step().isfinite() and batch.pixels().shape == (2, 3, 32, 32)


def test_a_network_without_batch_norm_is_refused():
    with pytest.raises(ConfigError, match="BatchNorm2d"):
        BatchNormPrior(nn.Conv2d(3, 4, 3), [0.5] * 3, [0.5] * 3, 16)


def tiny_resnet() -> ResNetModel:
    torch.manual_seed(0)
    network = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[16, 16, 24, 32], depths=[2, 1, 1, 2])).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return network


def torchvision_name(name: str) -> str:
    """The name that torchvision and timm give a tensor of transformers' ResNet: the other way round, by hand."""
    parts, kinds = name.split("."), {"convolution": "conv", "normalization": "bn"}
    if parts[0] == "embedder":
        return f"{kinds[parts[2]]}1.{parts[3]}"
    layer = f"layer{int(parts[2]) + 1}.{parts[4]}"
    if parts[5] == "shortcut":
        return f"{layer}.downsample.{['convolution', 'normalization'].index(parts[6])}.{parts[7]}"
    return f"{layer}.{kinds[parts[7]]}{int(parts[6]) + 1}.{parts[8]}"


@pytest.mark.parametrize("naming", ["torchvision", "transformers"])
def test_a_resnet_of_any_naming_is_the_network_that_was_saved(tmp_path, naming):
    network = tiny_resnet()
    rename = torchvision_name if naming == "torchvision" else (lambda name: f"resnet.{name}")
    tensors = {rename(name): tensor for name, tensor in network.state_dict().items()}
    save_file(tensors | {"fc.weight": torch.zeros(10, 32)}, tmp_path / "model.safetensors")
    loaded, images = load_resnet(tmp_path / "model.safetensors").eval(), torch.rand(2, 3, 64, 64)
    assert torch.equal(loaded(images).last_hidden_state, network(images).last_hidden_state)
    if naming == "torchvision":
        assert {"conv1.weight", "layer1.0.conv3.weight", "layer4.1.bn2.running_var", "layer2.0.downsample.1.bias"} <= {
            *tensors
        }


def test_the_default_of_transformers_is_a_resnet_50():
    """53 batch norms of 26,560 channels, as torchvision's `resnet50` has."""
    with torch.device("meta"):
        norms = [m for m in ResNetModel(ResNetConfig()).modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 53 and sum(norm.num_features for norm in norms) == 26_560


def saved(path, change):
    tensors = {torchvision_name(name): tensor for name, tensor in tiny_resnet().state_dict().items()}
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.pop("layer3.0.bn2.running_var"), "running_var must be .*, got nothing. Is it a ResNet-50"),
        (lambda t: t.update({"layer1.0.conv2.weight": torch.zeros(3, 3)}), r"must be \(4, 4, 3, 3\), got \(3, 3\)"),
        (lambda t: t.update({"layer1.0.se.weight": torch.zeros(3)}), "layer1.0.se.weight is no tensor of a ResNet"),
        (lambda t: [t.pop(name) for name in [*t] if "conv3" in name], "no ResNet of bottlenecks"),
    ],
)
def test_a_file_of_another_network_is_refused(tmp_path, change, reason):
    saved(tmp_path / "model.safetensors", change)
    with pytest.raises(ConfigError, match=reason):
        load_resnet(tmp_path / "model.safetensors")


def test_a_pickled_or_missing_file_is_refused(tmp_path):
    torch.save(tiny_resnet().state_dict(), tmp_path / "resnet50.pth")
    for path in (tmp_path / "resnet50.pth", tmp_path / "none.safetensors"):
        with pytest.raises(ConfigError, match=r"cnn: .* cannot be read .*timm/resnet50"):
            load_resnet(path)


def test_an_inversion_depends_on_the_bytes_of_its_cnn(tmp_path, tiny_pool):
    path, shards = tmp_path / "model.safetensors", []
    config = InversionConfig(images_per_class=1, iterations=1, priors={"batch_norm": 1.0}, cnn=str(path))
    for change in (lambda t: None, lambda t: t["bn1.running_mean"].add_(1)):
        saved(path, change)
        inverter = LoRAInverter(tiny_pool, config)
        shards.append((inverter._identity(tiny_pool.infos[0]), inverter.data_sha256, inverter.invert(0).pixels))
    assert shards[0][0] != shards[1][0] and shards[0][1] != shards[1][1]
    assert not torch.equal(shards[0][2], shards[1][2])
    assert LoRAInverter(tiny_pool, InversionConfig(cnn="unread")).data_sha256 == {}
    assert build_priors(InversionConfig(cnn="unread"), SimpleNamespace(num_prefix_tokens=1, image_size=8))
