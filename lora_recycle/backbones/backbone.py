"""One view of every vision transformer: tokens in, layers one by one, features out.

The transformers model stays as it is (PEFT wraps its layers in place); the view walks through it, so that tokens can
be dropped at any layer without touching the model's own code.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from ..errors import AdapterError, DataError
from ..hub.download import HubOptions
from .base_config import check_processor
from .base_models import BaseModel, OwnHead
from .cls_layer import cls_layer
from .families import FAMILIES
from .token_selection import (
    ATTENTION_NAME,
    ClsAttention,
    keep_tokens,
    num_kept,
    record_cls_attention,
    select_top,
    take_patches,
)


class Backbone(nn.Module):
    """A frozen vision transformer without a head.

    Args:
        model (`PreTrainedModel`): a headless model of a known family (`FAMILIES`).
        processor: its image processor (size, resampling, mean and standard deviation).
        name (`str`): what adapters call their base model.
        revision (`str`, *optional*): the commit it was loaded from.
        own_head ([`OwnHead`], *optional*): the classifier that the base model was published with.
    """

    mean: torch.Tensor  # buffers
    std: torch.Tensor

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        name: str,
        revision: str | None = None,
        own_head: OwnHead | None = None,
    ):
        super().__init__()
        family = FAMILIES.get(model.config.model_type)
        if family is None:
            known = ", ".join(FAMILIES)
            raise AdapterError(f"{name}: backbones of type {model.config.model_type} are not supported ({known} are).")
        if family.pooler and not hasattr(model, family.pooler):
            raise AdapterError(f"{name}: has neither a CLS token nor a pooling head, so images have no feature.")
        check_processor(processor, name)
        model.set_attn_implementation(ATTENTION_NAME)
        _align(model)
        self.model = model.eval().requires_grad_(False)
        self.family, self.processor, self.name, self.revision = family, processor, name, revision
        mean = torch.tensor(processor.image_mean, dtype=torch.float32).view(1, 3, 1, 1)
        std = torch.tensor(processor.image_std, dtype=torch.float32).view(1, 3, 1, 1)
        self.own_head = own_head
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> Backbone:
        """Load a backbone and its image processor from a folder or a repo id (`demo`: the embedded one).

        Raises:
            AdapterError: it is not available, damaged, not whole, or of an unknown type.
        """
        hub = HubOptions(
            token=token, cache_dir=cache_dir, local_files_only=local_files_only, force_download=force_download
        )
        base = BaseModel.pull(name_or_path, revision, **hub)
        model = base.load_tower(dtype or torch.float32)
        backbone = cls(model, base.image_processor(), base.name, base.commit, base.own_head())
        return backbone.to(device) if device is not None else backbone

    def __repr__(self) -> str:
        return f"Backbone({self.name!r}, {self.model.config.model_type}, {self.image_size}x{self.image_size} pixels)"

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.get_submodule(self.family.layers)

    @property
    def hidden_size(self) -> int:
        return self.model.config.hidden_size

    @property
    def head_size(self) -> int:
        """Width of what a classification head of this family reads."""
        return self.hidden_size * (2 if self.family.head_input == "cls+patches" else 1)

    @property
    def image_size(self) -> int:
        size = self.model.config.image_size
        return size if isinstance(size, int) else size[0]

    @property
    def patch_size(self) -> int:
        size = self.model.config.patch_size
        return size if isinstance(size, int) else size[0]

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: CLS, and DeiT's distillation token or DINOv2's registers; none for SigLIP."""
        if self.family.pooler:
            return 0
        if self.model.config.model_type == "deit":
            return 2
        return 1 + getattr(self.model.config, "num_register_tokens", 0)

    @property
    def has_weights(self) -> bool:
        """Whether it can be run: one on the meta device has only names and shapes, for adapters to be checked on."""
        return not next(self.model.parameters()).is_meta

    @property
    def device(self) -> torch.device:
        return self.mean.device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def processor_settings(self) -> dict[str, Any]:
        """How images reach the backbone, as manifests and sidecars record it."""
        return {
            "size": self.image_size,
            "resample": int(self.processor.resample),
            "image_mean": list(self.processor.image_mean),
            "image_std": list(self.processor.image_std),
        }

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """Images in [0, 1], or uint8, to the backbone's own pixel values: (B, 3, H, W), or patches (B, k, 3, p, p)."""
        if images.dtype == torch.uint8:
            images = images.to(self.device).to(self.mean.dtype) / 255
        return (images - self.mean) / self.std

    def embed(self, pixel_values: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
        """Tokens before the first layer, all or those of the kept patches: (B, 3, H, W) to (B, prefix + P or k, D)."""
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != (3, self.image_size, self.image_size):
            raise DataError(
                f"{self.name} takes images of shape (B, 3, {self.image_size}, {self.image_size}), "
                f"got {tuple(pixel_values.shape)}. Pass images through its image processor first."
            )
        if kept is not None and isinstance(self._patch_projection, nn.Conv2d):  # no adapter wraps it
            return self.embed_patches(take_patches(pixel_values, kept, self.patch_size), kept)
        hidden = self._embeddings(pixel_values.to(self.dtype))
        hidden = self.model.get_submodule(self.family.pre_norm)(hidden) if self.family.pre_norm else hidden
        return hidden if kept is None else keep_tokens(hidden, kept, self.num_prefix_tokens)

    @property
    def _embeddings(self) -> nn.Module:
        return self.model.get_submodule("embeddings")

    @property
    def _patch_projection(self) -> Any:
        """The convolution, or PEFT's layer around it."""
        embeddings = self._embeddings
        names = ("patch_embedding", "patch_embeddings.projection")  # CLIP and SigLIP; ViT and DINOv2
        return next(module for name, module in embeddings.named_modules() if name in names)

    def embed_patches(self, patches: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """Tokens of some patches, the others never embedded: (B, k, 3, p, p), int64 (B, k) to (B, prefix + k, D).

        Embeddings are linear in the pixels: what they make of an empty image (positions, the tokens before the
        patches), plus the projection of each patch.
        """
        empty = self._embeddings(self.mean.new_zeros(1, 3, self.image_size, self.image_size, dtype=self.dtype))
        weight = self._patch_projection.weight.flatten(1)
        tokens = keep_tokens(empty.expand(len(kept), -1, -1), kept, self.num_prefix_tokens)
        patches = F.linear(patches.flatten(2).to(weight.dtype), weight)
        prefix, rest = tokens.split([self.num_prefix_tokens, kept.shape[1]], dim=1)
        hidden = torch.cat([prefix, rest + patches], dim=1)
        return self.model.get_submodule(self.family.pre_norm)(hidden) if self.family.pre_norm else hidden

    def forward(
        self,
        pixel_values: torch.Tensor,
        kept: torch.Tensor | None = None,
        prune: Mapping[int, float] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Tokens after the last layer, before the final norm.

        Args:
            pixel_values: (B, 3, H, W), normalised; with `kept` also the kept patches alone, (B, k, 3, p, p).
            kept: int64 (B, k), the patches that are forwarded; all by default.
            prune: layer index to keep ratio (of all patches): after that layer only the patches with the highest CLS
                attention go on (without CLS, with the highest attention of all patches).

        Returns:
            Hidden states (B, prefix + k, D) and the positions (B, k) of the patches still there (None for all).
        """
        hidden, prefix = self.tokens_entering(0, pixel_values, kept), self.num_prefix_tokens
        for i, layer in enumerate(self.layers):
            if not prune or i not in prune:
                hidden = self._call(layer, hidden)
                continue
            with self.record_attention(i) as attention:
                hidden = self._call(layer, hidden)
            k = num_kept(self.num_patches, prune[i])
            if k < hidden.shape[1] - prefix:
                chosen = select_top(attention.row[:, prefix:], k)
                hidden = keep_tokens(hidden, chosen, prefix)
                kept = chosen if kept is None else kept.gather(1, chosen)
        return hidden, kept

    def record_attention(self, layer: int) -> AbstractContextManager[ClsAttention]:
        """Record the attention that tokens get in a layer: CLS's, or the mean of all tokens' without CLS."""
        return record_cls_attention(self.layers[layer], has_cls=self.family.pooler is None)

    @staticmethod
    def _call(layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        output = layer(hidden, None)
        return output[0] if isinstance(output, tuple) else output

    def pool_features(self, hidden: torch.Tensor) -> torch.Tensor:
        """The image's feature, the normed CLS token or what the family's pooler gives: (B, T, D) to (B, D)."""
        norm = self.model.get_submodule(self.family.norm)
        if self.family.pooler:
            return self.model.get_submodule(self.family.pooler)(norm(hidden))
        return norm(hidden[:, 0])

    def pool_for_head(self, hidden: torch.Tensor) -> torch.Tensor:
        """What this family's classification heads read: (B, T, D) to (B, `head_size`)."""
        if self.family.head_input == "cls":
            return self.pool_features(hidden)
        if not self.family.head_before_norm:
            hidden = self.model.get_submodule(self.family.norm)(hidden)
        patches = hidden[:, self.num_prefix_tokens :].mean(1)
        return patches if self.family.head_input == "patches" else torch.cat([hidden[:, 0], patches], -1)

    def features(self, pixel_values: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
        """Features of normalised images, or of their kept patches, as `forward` takes them: to (B, D)."""
        return self.features_from(self.tokens_entering(0, pixel_values, kept))

    def tokens_entering(
        self, layer: int, pixel_values: torch.Tensor, kept: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The tokens that layer number `layer` gets, of images as `features` takes them: to (B, T, D)."""
        if kept is not None and pixel_values.ndim == 5:
            hidden = self.embed_patches(pixel_values, kept)
        else:
            hidden = self.embed(pixel_values, kept)
        for before in self.layers[:layer]:
            hidden = self._call(before, hidden)
        return hidden

    def features_from(self, hidden: torch.Tensor, first: int = 0) -> torch.Tensor:
        """Features from the tokens that enter layer `first`: (B, T, D) to (B, D)."""
        *layers, last = self.layers[first:]
        for layer in layers:
            hidden = self._call(layer, hidden)
        return self.pool_features(self._call(last, hidden) if self.family.pooler else cls_layer(last, hidden))


def _align(model: nn.Module) -> None:
    """Copy weights that begin anywhere in memory, as those of a mapped file do, to where torch's own begin.

    Products with one or two tokens round by where their operands lie, and a model is to answer bit for bit the same
    whether it was made or loaded.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()


def check_embeddings(features: torch.Tensor, pixel_values: torch.Tensor, name: str) -> None:
    """Refuse embeddings (B, D) whose length is not finite: whatever compares them answers the first class.

    Raises:
        DataError: the images (B, ...) hold NaN or infinity.
        AdapterError: the images are sound, so the model `name` is not.
    """
    if features.float().norm(dim=-1).isfinite().all():
        return
    if not pixel_values.isfinite().all():
        raise DataError("The images hold NaN or infinity, so their embeddings do too. Look at how they were made.")
    raise AdapterError(
        f"{name}: embeddings are not finite. Look at the weights of the base model and of the adapter for NaN or "
        "absurdly large numbers, and at dtype: float16 overflows where bfloat16 and float32 do not."
    )


@torch.inference_mode()
def extract_features(
    backbone: Backbone, images: torch.Tensor, batch_size: int = 128, kept: torch.Tensor | None = None
) -> torch.Tensor:
    """Features of many images, float32 on the CPU: uint8 (N, 3, H, W) to (N, D).

    Raises:
        AdapterError: they are not finite.
    """
    chunks = []
    for start in range(0, len(images), batch_size):
        part = slice(start, start + batch_size)
        tokens = None if kept is None else kept[part].to(backbone.device)
        pixel_values = backbone.normalize(images[part])
        features = backbone.features(pixel_values, tokens)
        check_embeddings(features, pixel_values, backbone.name)
        chunks.append(features.float().cpu())
    return torch.cat(chunks) if chunks else torch.zeros(0, backbone.hidden_size)
