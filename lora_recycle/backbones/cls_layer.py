"""The last layer of a transformer whose feature is the CLS token: nothing after it reads the other tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


def cls_layer(layer: Any, hidden: torch.Tensor) -> torch.Tensor:
    """What a pre-norm layer makes of the CLS token: (B, T, D) to (B, 1, D).

    All tokens are keys and values; query, output projection and MLP, five sixths of a layer's work, are CLS's alone.
    `layer` is one of the families in `backbones.families.FAMILIES`, in evaluation mode.
    """
    attention = _part(layer, "attention", "self_attn")
    normed = _part(layer, "layernorm_before", "norm1", "layer_norm1")(hidden)

    def heads(tokens: torch.Tensor) -> torch.Tensor:  # (B, T, D) to (B, heads, T, head_dim)
        return tokens.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

    # CLS as (B, D): products of (B, 1, D) would round differently where the weights learn and where they do not
    query = heads(attention.q_proj(normed[:, 0]).unsqueeze(1))
    key, value = heads(attention.k_proj(normed)), heads(attention.v_proj(normed))
    looked = F.scaled_dot_product_attention(query, key, value, scale=attention.head_dim**-0.5)
    looked = _part(attention, "o_proj", "out_proj")(looked.flatten(1))
    cls = hidden[:, 0] + _part(layer, "layer_scale1", default=nn.Identity())(looked)
    changed = layer.mlp(_part(layer, "layernorm_after", "norm2", "layer_norm2")(cls))
    return (cls + _part(layer, "layer_scale2", default=nn.Identity())(changed)).unsqueeze(1)


def _part(module: nn.Module, *names: str, default: nn.Module | None = None) -> Any:
    """The submodule under the one of its `names` that this family uses: each has a class of its own."""
    return next((getattr(module, name) for name in names if hasattr(module, name)), default)
