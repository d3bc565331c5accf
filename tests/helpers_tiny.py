"""Tiny backbones, images and adapters with planted weights, never downloaded."""

import copy
import dataclasses
import json
from pathlib import Path

import peft
import torch
import torch.nn.functional as F
import yaml
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil, ViTModel

from lora_recycle.adapters.adapter import Adapter
from lora_recycle.adapters.files import checksums
from lora_recycle.adapters.pull import AdapterInfo
from lora_recycle.backbones.backbone import Backbone
from lora_recycle.images.labelled import LabelledImages
from lora_recycle.inversion.inverter import LoRAInverter


SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
#: All linear layers of these.
TINY_LAYERS = ["fc1", "fc2", "k_proj", "o_proj", "q_proj", "v_proj"]


def tiny_processor() -> ViTImageProcessorPil:
    return ViTImageProcessorPil(
        size={"height": 32, "width": 32}, resample=3, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.25, 0.3]
    )


def shake(model: torch.nn.Module, seed: int = 0, scale: float = 0.1) -> torch.nn.Module:
    """Move every weight and bias, so that norms and biases matter and attention is not even."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@torch.no_grad()
def tiny_vit(seed: int = 0, **changes) -> ViTModel:
    """Its weights are uniform numbers, which are the same on every processor to the bit; normal ones are not."""
    torch.manual_seed(seed)  # of what the caller adds to it
    model, generator = ViTModel(ViTConfig(**(SIZES | changes)), add_pooling_layer=False), torch.Generator()
    generator.manual_seed(seed)
    for name, parameter in model.named_parameters():
        middle = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.copy_(middle + uniform(parameter.shape, 0.18, generator))
    return model.eval()


def uniform(shape: torch.Size, reach: float, generator: torch.Generator) -> torch.Tensor:
    return reach * (2 * torch.rand(shape, generator=generator) - 1)


def tiny_backbone(seed: int = 0, name: str = "tiny") -> Backbone:
    return Backbone(tiny_vit(seed), tiny_processor(), name)


def save_tiny_backbone(folder: Path, seed: int = 0) -> Path:
    tiny_vit(seed).save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


def toy_images(classes: int = 8, each: int = 20, seed: int = 0) -> LabelledImages:
    """uint8 (classes x each, 3, 32, 32): a colour for each class, noise for each image."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.rand(classes, 1, 3, 1, 1, generator=generator) * 200
    noise = torch.rand(classes, each, 3, 32, 32, generator=generator) * 55
    labels = torch.arange(classes).repeat_interleave(each)
    return LabelledImages(
        (colours + noise).to(torch.uint8).flatten(0, 1), labels, [f"n{i}" for i in range(classes)], "toy"
    )


def repair_checksums(folder: Path) -> None:
    """Make a meta-LoRA's sidecar fit the files beside it, as a hostile author would."""
    sidecar = folder / "meta_lora_config.json"
    settings = json.loads(sidecar.read_text()) | {"checksums": checksums(folder)}
    sidecar.write_text(json.dumps(settings))


def random_pixels(count: int, seed: int = 0) -> torch.Tensor:
    """uint8 (count, 3, 32, 32)."""
    return torch.randint(0, 256, (count, 3, 32, 32), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def planted_adapter(name: str, factors: dict[str, tuple[torch.Tensor, torch.Tensor]], labels=None) -> Adapter:
    """An adapter of given weight changes, without a file or a head."""
    info = AdapterInfo(
        name=name,
        path=Path(name),
        revision=None,
        sha256=name,
        base_model="tiny",
        base_revision=None,
        peft_type="LORA",
        rank=None,
        alpha=None,
        targets=(),
        num_parameters=0,
        size_bytes=0,
        num_classes=None,
        labels=labels,
        generation=5,
        config={},
    )
    return Adapter(info, factors, {})


def random_factors(shapes: dict[str, tuple[int, int, int]], seed: int, scale: float = 0.1):
    """Module to (B, A) of shapes (out, r), (r, in), from {module: (out, r, in)}."""
    generator = torch.Generator().manual_seed(seed)
    return {
        module: (
            scale * torch.randn(out, rank, generator=generator),
            torch.randn(rank, width, generator=generator),
        )
        for module, (out, rank, width) in shapes.items()
    }


@torch.no_grad()
def save_tiny_adapter(
    folder: Path, base: Path, data: LabelledImages, classes: list[int], config: peft.PeftConfig, seed: int
) -> Path:
    """An adapter of `classes` as PEFT saves it, without any training, which ends elsewhere on every processor.

    Its changes are random, and its head is the ridge regression on the classes of what the changed network sees. Files
    are the same to the bit everywhere: their checksums are seeds of the inversion. So the head is found in float64.
    """
    names = {i: data.label_names[c] for i, c in enumerate(classes)}
    model = ViTForImageClassification.from_pretrained(base, num_labels=len(classes), id2label=names)
    wrapped, generator = peft.get_peft_model(model, config), torch.Generator().manual_seed(seed)
    reach = 0.45 if config.peft_type == "LOHA" else 0.2  # a LoHa multiplies four matrices, a LoRA two
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad and "classifier" not in name:
            middle = 0.6 if "magnitude" in name else 0.0  # of a DoRA: about the length of a row of weights
            parameter.copy_((middle + uniform(parameter.shape, reach, generator)).half())
    rows = torch.cat([data.by_class()[c] for c in classes])
    network, pixels = copy.deepcopy(wrapped.eval()).double(), tiny_backbone().normalize(data.pixels[rows]).double()
    features = network.base_model.model.vit(pixels).last_hidden_state[:, 0]
    targets = F.one_hot(data.labels[rows][:, None].eq(torch.tensor(classes)).int().argmax(1), len(classes))
    weight = 6 * ridge(features, targets.double())
    head = wrapped.base_model.model.classifier.modules_to_save["default"]
    head.weight.copy_(weight)
    head.bias.copy_(6 / len(classes) - weight @ features.mean(0))
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.half()
    wrapped.peft_config["default"].base_model_name_or_path = str(base)
    wrapped.save_pretrained(str(folder), save_embedding_layers=False)
    header = {"library_name": "peft", "base_model": str(base), "id2label": names}
    card = f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n\n# {folder.name}\n"
    (folder / "README.md").write_text(card, encoding="utf-8")
    return folder


def ridge(features: torch.Tensor, targets: torch.Tensor, penalty: float = 1e-3) -> torch.Tensor:
    """(N, D), (N, C) to the weights (C, D) that tell the centred targets of the centred features."""
    centred = features - features.mean(0)
    products = centred.T @ centred
    products += penalty * products.trace() / len(products) * torch.eye(len(products))
    return torch.linalg.solve(products, centred.T @ (targets - targets.mean(0))).T


class GivenImages(LoRAInverter):
    """Stores toy images of the classes, dimmed and noisy, where an inversion would optimise them."""

    def _optimise(self, index, starts, labels, generator):
        data, noise = toy_images(), torch.randint(0, 256, starts.shape, generator=generator)
        names = [self.pool.infos[index].labels[label] for label in labels.tolist()]
        rows = torch.tensor([data.label_names.index(name) * 20 + i % 20 for i, name in enumerate(names)])
        return (0.4 * data.pixels[rows] + 0.6 * noise).to(torch.uint8)


def same_weights(one: torch.nn.Module, state: dict[str, torch.Tensor]) -> bool:
    """Whether the module's state is `state`, bit by bit."""
    now = one.state_dict()
    return now.keys() == state.keys() and all(torch.equal(now[key], value) for key, value in state.items())


def copied_state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


@dataclasses.dataclass
class ListedShard:
    """What is needed of [`ShardRows`]: labels of images that nobody looks at."""

    adapter: dict
    labels: torch.Tensor
    tensors: tuple = ()

    def __len__(self):
        return len(self.labels)
