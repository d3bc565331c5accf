"""The student: a copy of the backbone that wears one trainable adapter, the meta-LoRA to be."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.shira import ShiraLayer
from torch import nn

from ..backbones import Backbone
from ..embedded import backbone_name
from ..errors import ConfigError
from ..pool import AdapterPool
from ..surrogate import SurrogateDataset
from ..wrapping import wrap
from .adapter_types import (
    adapted_layers,
    adapter_config,
    principal_factors,
    start_from_principal,
    start_lora,
    start_shira,
)
from .config import AVERAGES, PRINCIPAL_STARTS, DistillationConfig
from .images import match_shards


#: Surrogate images whose activations CorDA looks at.
CORDA_IMAGES = 128


def linear_layers(backbone: Backbone) -> list[str]:
    """Paths of all linear layers inside the transformer layers."""
    prefix = backbone.family.layers + "."
    modules = backbone.model.named_modules()
    return sorted(name for name, m in modules if name.startswith(prefix) and isinstance(m, nn.Linear))


class Student(nn.Module):
    """Backbone + adapter; only the adapter learns.

    Args:
        backbone ([`Backbone`]): copied, so that the teachers never see the student's weights.
        rank (`int`): of the adapter, on all linear layers; a LoRA's scale is 1. See [`adapter_config`].
        base_name (`str`): what the saved adapter gives as its base model.
        seed (`int`): of the adapter's random numbers.
        first_layer (`int`): the adapter of the layers before it keeps its initialisation.
        peft_type (`str`): a LoRA, or one of the other `DistillationConfig.peft_type`.

    Raises:
        ConfigError: there is no layer `first_layer`.
    """

    def __init__(
        self,
        backbone: Backbone,
        rank: int,
        base_name: str,
        seed: int = 0,
        first_layer: int = 0,
        peft_type: str = "LORA",
    ):
        super().__init__()
        self.backbone, self.first_layer = copy.deepcopy(backbone), first_layer
        if first_layer >= len(backbone.layers):
            raise ConfigError(f"first_layer must be in [0, {len(backbone.layers)}), got {first_layer}")
        config = adapter_config(peft_type, rank, linear_layers(backbone), backbone, seed)
        self.rank = getattr(config, "r", rank)
        #: squares of the average's singular values, the largest of all layers together, the second largest, ...
        self.average_spectrum: torch.Tensor | None = None
        config.base_model_name_or_path = base_name
        config.revision = backbone.revision
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.peft_model: PeftModel = wrap(self.backbone.model, config)
        self.backbone.layers[:first_layer].requires_grad_(False)
        self._layers = adapted_layers(self.backbone.model)
        self._plain = list(self._layers.values()) if peft_type == "LORA" else []

    def forward(self, inputs: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
        """Features (B, D) of images (B, 3, H, W), of their kept patches alone (B, k, 3, p, p), or of the tokens that
        enter `first_layer` (B, T, D), from `tokens`."""
        with self._plain_layers():
            if inputs.ndim == 3:
                return self.backbone.features_from(inputs, self.first_layer)
            return self.backbone.features(inputs, kept)

    @torch.inference_mode()
    def tokens(self, inputs: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
        """What enters `first_layer`, which does not change while the layers from there on learn."""
        return self.backbone.tokens_entering(self.first_layer, inputs, kept)

    @contextlib.contextmanager
    def _plain_layers(self) -> Iterator[None]:
        """PEFT's layers without their checks and their product with a scale of 1, a tenth of a small model's step."""
        for layer in self._plain:
            layer.forward = functools.partial(_plain_forward, layer)
        try:
            yield
        finally:
            for layer in self._plain:
                del layer.forward

    def start_from_average(self, pool: AdapterPool, scale: float = 1.0) -> None:
        """Set the adapter to the exact mean of the pool's weight changes, cut to the rank, times `scale`; for SHiRA,
        to those of its entries that are largest. Layers that no adapter of the pool changes stay as they are."""
        sparse = any(isinstance(layer, ShiraLayer) for layer in self._layers.values())
        spectra = []
        for name, (b, a) in pool.whole_averages():
            spectra.append(b.square().sum(0) * a.square().sum(1))
            if not sparse:
                b, a = b[:, : self.rank], a[: self.rank]
            (start_shira if sparse else start_lora)(self._layers[name], b * scale, a)
        if spectra and not sparse:
            self.average_spectrum = torch.nn.utils.rnn.pad_sequence(spectra).sum(1)

    def average_share(self, rank: int) -> float:
        """What a LoRA of a rank holds of the average that this one started from: the share of the squared norm of its
        change, over all layers. 1 where it did not start from an average."""
        if self.average_spectrum is None:
            return 1.0
        return (self.average_spectrum[:rank].sum() / self.average_spectrum.sum().clamp_min(1e-30)).item()

    def start_from_principal(self, method: str, pool: AdapterPool, images: torch.Tensor | None = None) -> None:
        """Let the LoRA learn what [`principal_factors`] finds in the pool's backbone at half its rank; the other half
        takes that out of the frozen weights."""
        factors = principal_factors(pool.backbone, method, self.rank // 2, list(self._layers), images)
        for name, layer in self._layers.items():
            start_from_principal(layer, *factors[name])

    def trainable(self) -> list[nn.Parameter]:
        return [p for p in self.parameters() if p.requires_grad]


def start_student(config: DistillationConfig, pool: AdapterPool, surrogate: SurrogateDataset | None) -> Student:
    """The student of a recipe, before its first step."""
    rank = config.rank * (2 if config.init in PRINCIPAL_STARTS else 1)
    base = backbone_name(pool.backbone.name)
    student = Student(pool.backbone, rank, base, config.seed, config.first_layer, config.peft_type)
    if config.init in AVERAGES:
        student.start_from_average(pool, pool.dilution() if config.init == "undiluted" else 1.0)
    elif config.init in PRINCIPAL_STARTS:
        shown = None
        if config.init == "corda" and surrogate is not None:
            images = match_shards(pool, surrogate)
            shown = images.read("pixels", torch.linspace(0, len(images) - 1, CORDA_IMAGES).long())
        student.start_from_principal(config.init, pool, shown)
    return student


def _plain_forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """W x + B A x of a `LoraLayer`, in the dtype of W x."""
    result, a = layer.base_layer(x), layer.lora_A["default"]
    if not torch.is_autocast_enabled(x.device.type):  # which would make it bfloat16 again: a sixth of a step on a CPU
        x = x.to(a.weight.dtype)
    return (result + layer.lora_B["default"](a(x))).to(result.dtype)
