"""The student: a copy of the backbone that wears one trainable adapter, the meta-LoRA to be."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.shira import ShiraLayer
from torch import nn

from ..adapters.adapter import Factors
from ..adapters.low_rank import truncate
from ..adapters.trainable import (
    adapted_layers,
    adapter_config,
    linear_layers,
    matrices,
    principal_factors,
    start_from_principal,
    start_lora,
    start_shira,
    wrap_seeded,
)
from ..backbones.backbone import Backbone
from ..errors import ConfigError
from ..hub.embedded import backbone_name
from ..merging.base import Merge
from ..merging.groups import GroupSum, Restored, Undiluted
from ..modeling.meta_lora import MetaLoRAForFewShotClassification
from ..pool.pool import AdapterPool
from ..surrogate.dataset import SurrogateDataset
from .config import AVERAGES, PRINCIPAL_STARTS, DistillationConfig
from .surrogate_images import match_shards


#: Surrogate images whose activations CorDA looks at.
CORDA_IMAGES = 128


#: What a pool is merged to before a student starts from it; the average itself needs no merge.
_MERGES: dict[str, Merge] = {"restored": Restored(), "undiluted": Undiluted(), "group-sum": GroupSum()}


class Student(nn.Module):
    """Backbone + adapter; only the adapter learns.

    Args:
        backbone ([`Backbone`]): copied, so that the teachers never see the student's weights.
        rank (`int`): of the adapter; a LoRA's scale is 1. See [`adapter_config`].
        base_name (`str`): what the saved adapter gives as its base model.
        seed (`int`): of the adapter's random numbers.
        first_layer (`int`): the adapter of the layers before it keeps its initialisation.
        peft_type (`str`): a LoRA, or one of the other `DistillationConfig.peft_type`.
        targets (`str`): which linear layers it adapts, see [`linear_layers`].

    Raises:
        ConfigError: there is no layer `first_layer`, or no linear layer of a name in `targets`.
    """

    def __init__(
        self,
        backbone: Backbone,
        rank: int,
        base_name: str,
        seed: int = 0,
        first_layer: int = 0,
        peft_type: str = "LORA",
        targets: str = "all",
    ):
        super().__init__()
        self.backbone, self.first_layer = copy.deepcopy(backbone), first_layer
        if first_layer >= len(backbone.layers):
            raise ConfigError(f"first_layer must be in [0, {len(backbone.layers)}), got {first_layer}")
        config = adapter_config(peft_type, rank, linear_layers(backbone, targets), backbone, seed)
        self.rank = getattr(config, "r", rank)
        #: its initialisation, where it began to learn elsewhere: B and A by layer
        self._init: Factors = {}
        #: share of its own change in a forward, beside its initialisation
        self._alpha = 1.0
        #: squares of the average's singular values, the largest of all layers together, the second largest, ...
        self.average_spectrum: torch.Tensor | None = None
        config.base_model_name_or_path = base_name
        config.revision = backbone.revision
        self.peft_model: PeftModel = wrap_seeded(self.backbone.model, config, seed)
        self.backbone.layers[:first_layer].requires_grad_(False)
        self._layers = adapted_layers(self.backbone.model)
        self._plain = self._layers if peft_type == "LORA" else {}

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
        for name, layer in self._plain.items():
            forward = functools.partial(_plain_forward, layer)
            if self._alpha < 1:
                forward = functools.partial(_mixed_forward, layer, self._alpha, self._init[name])
            layer.forward = forward
        try:
            yield
        finally:
            for layer in self._plain.values():
                del layer.forward

    def start_from_average(self, pool: AdapterPool) -> None:
        """Set the adapter to the exact mean of the pool's weight changes, cut to the rank; for SHiRA, to those of its
        entries that are largest. Layers that no adapter of the pool changes stay as they are; of those that are not
        the adapter's targets the mean is left out."""
        sparse = any(isinstance(layer, ShiraLayer) for layer in self._layers.values())
        spectra = []
        for name, (b, a) in pool.whole_averages():
            if name not in self._layers:
                continue
            spectra.append(b.square().sum(0) * a.square().sum(1))
            if not sparse:
                b, a = b[:, : self.rank], a[: self.rank]
            (start_shira if sparse else start_lora)(self._layers[name], b, a)
        if spectra and not sparse:
            self.average_spectrum = torch.nn.utils.rnn.pad_sequence(spectra).sum(1)

    def begin_at_group_sum(self, pool: AdapterPool) -> None:
        """Let a LoRA begin to learn at the sum of the averages of the pool's groups, cut to the rank.

        What it was set to before is its initialisation, with which `mixed` and `mix` mix what it learns, and stays
        in layers that do not learn.

        In a pool of one group, where that sum is the average, it begins at its initialisation.
        """
        for name, layer in self._layers.items():
            own_a, own_b = matrices(layer)
            self._init[name] = (own_b.detach().clone(), own_a.detach().clone())
        if len(pool.groups()) > 1:
            for name, (b, a) in _merged(pool, GroupSum()).whole_averages():
                if name in self._layers and matrices(self._layers[name])[0].requires_grad:
                    start_lora(self._layers[name], b[:, : self.rank], a[: self.rank])

    @contextlib.contextmanager
    def mixed(self, alpha: float) -> Iterator[None]:
        """A forward meanwhile is that of `mix`, not cut to the rank."""
        device = self.backbone.device
        self._init = {name: (b.to(device), a.to(device)) for name, (b, a) in self._init.items()}
        self._alpha = alpha
        try:
            yield
        finally:
            self._alpha = 1.0

    @torch.no_grad()
    def mix(self, alpha: float) -> None:
        """Set the LoRA to `alpha` of its change plus `1 - alpha` of its initialisation, cut to the rank.

        With 1 it stays as it is; with 0 it is the initialisation, bit for bit. WiSE-FT (arXiv 2109.01903), on weight
        changes.
        """
        if alpha == 1:
            return
        for name, layer in self._layers.items():
            a, b = matrices(layer)
            if not a.requires_grad:  # is at its initialisation
                continue
            b0, a0 = (factor.to(a.device) for factor in self._init[name])
            if alpha:
                both = torch.cat([b * alpha, b0 * (1 - alpha)], 1), torch.cat([a, a0])
                b0, a0 = truncate(*both, self.rank)
            start_lora(layer, b0, a0)

    def average_share(self, rank: int) -> float:
        """What a LoRA of a rank holds of the average that this one started from: the share of the squared norm of its
        change, over the layers that it adapts. 1 where it did not start from an average."""
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

    def to_model(self, settings: dict[str, Any] | None = None) -> MetaLoRAForFewShotClassification:
        """The student as the model that users load; `settings` go into its sidecar."""
        return MetaLoRAForFewShotClassification(self.backbone, self.peft_model, settings)


def start_student(config: DistillationConfig, pool: AdapterPool, surrogate: SurrogateDataset | None) -> Student:
    """The student of a recipe, before its first step."""
    rank = config.rank * (2 if config.init in PRINCIPAL_STARTS else 1)
    base = backbone_name(pool.backbone.name)
    student = Student(pool.backbone, rank, base, config.seed, config.first_layer, config.peft_type, config.targets)
    if config.init in AVERAGES:
        merge = _MERGES.get(config.init) if len(pool.groups()) > 1 else None
        student.start_from_average(pool if merge is None else _merged(pool, merge))
        if config.mixes:
            student.begin_at_group_sum(pool)
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


def _mixed_forward(layer: Any, alpha: float, init: tuple[torch.Tensor, torch.Tensor], x: torch.Tensor) -> Any:
    """W x + alpha B A x + (1 - alpha) B' A' x, with B' A' the initialisation."""
    result, (own_a, own_b) = layer.base_layer(x), matrices(layer)
    for factor, (b, a) in ((alpha, (own_b, own_a)), (1 - alpha, init)):
        if factor:
            result = result + (F.linear(F.linear(x.to(a.dtype), a), b) * factor).to(result.dtype)
    return result


def _merged(pool: AdapterPool, merge: Merge) -> AdapterPool:
    return AdapterPool(pool.backbone, [merge.merge(pool)])
