"""The student: a copy of the backbone that wears one trainable LoRA, the meta-LoRA to be."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from ..backbones import Backbone
from ..errors import ConfigError
from ..pool import AdapterPool


def linear_layers(backbone: Backbone) -> list[str]:
    """Paths of all linear layers inside the transformer layers."""
    prefix = backbone.family.layers + "."
    modules = backbone.model.named_modules()
    return sorted(name for name, m in modules if name.startswith(prefix) and isinstance(m, nn.Linear))


class Student(nn.Module):
    """Backbone + LoRA; only the LoRA learns.

    Args:
        backbone ([`Backbone`]): copied, so that the teachers never see the student's weights.
        rank (`int`): of the LoRA, on all linear layers; its scale is 1.
        base_name (`str`): what the saved adapter gives as its base model.
        seed (`int`): of the LoRA's random factors.
        first_layer (`int`): the LoRA of the layers before it keeps its initialisation.

    Raises:
        ConfigError: there is no layer `first_layer`.
    """

    def __init__(self, backbone: Backbone, rank: int, base_name: str, seed: int = 0, first_layer: int = 0):
        super().__init__()
        self.backbone, self.first_layer = copy.deepcopy(backbone), first_layer
        if first_layer >= len(backbone.layers):
            raise ConfigError(f"first_layer must be in [0, {len(backbone.layers)}), got {first_layer}")
        limit = min(min(self.backbone.model.get_submodule(m).weight.shape) for m in linear_layers(backbone))
        self.rank = min(rank, limit)
        config = LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules=linear_layers(backbone))
        config.base_model_name_or_path = base_name
        config.revision = backbone.revision
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.peft_model: PeftModel = get_peft_model(self.backbone.model, config)
        config.base_model_name_or_path = base_name
        self.backbone.layers[:first_layer].requires_grad_(False)
        self._lora_layers = [m for m in self.backbone.model.modules() if isinstance(m, LoraLayer)]

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
        for layer in self._lora_layers:
            layer.forward = functools.partial(_plain_forward, layer)
        try:
            yield
        finally:
            for layer in self._lora_layers:
                del layer.forward

    @torch.no_grad()
    def start_from_average(self, pool: AdapterPool, scale: float = 1.0) -> None:
        """Set the LoRA to the exact mean of the pool's weight changes, cut to the rank, times `scale`."""
        average = pool.average(self.rank)
        for name, module in self.backbone.model.named_modules():
            if not hasattr(module, "lora_A"):
                continue
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            if name not in average:  # no adapter of the pool changes this layer: B = 0 leaves it alone
                continue
            factor_b, factor_a = average[name]
            b.zero_()  # where the average has a lower rank, the rows of A beyond it stay random, free to learn
            a[: len(factor_a)].copy_(factor_a)
            b[:, : factor_b.shape[1]].copy_(factor_b * scale)

    def trainable(self) -> list[nn.Parameter]:
        return [p for p in self.parameters() if p.requires_grad]


def _plain_forward(layer: LoraLayer, x: torch.Tensor) -> torch.Tensor:
    """W x + B A x, in the dtype of W x."""
    result, a = layer.base_layer(x), layer.lora_A["default"]
    return (result + layer.lora_B["default"](a(x.to(a.weight.dtype)))).to(result.dtype)
