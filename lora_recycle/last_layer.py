"""The last layer of a transformer whose feature is the CLS token: nothing after it reads the patches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


#: CLS and company: the last bit of products of one to three rows depends on where in memory the weights lie (MKL), and
#: a loaded model is to answer bit by bit as the one that was saved.
_ROWS = 8


def cls_layer(layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """What a pre-norm layer makes of the CLS token and the next few: (B, T, D) to (B, min(T, 8), D).

    All tokens are keys and values; query, output projection and MLP, five sixths of a layer's work, are theirs alone.
    `layer` is one of the families in `backbones.FAMILIES`, in evaluation mode.
    """
    attention = _part(layer, "attention", "self_attn")
    normed = _part(layer, "layernorm_before", "norm1", "layer_norm1")(hidden)
    query, key, value = (
        project(tokens).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for project, tokens in (
            (attention.q_proj, normed[:, :_ROWS]),
            (attention.k_proj, normed),
            (attention.v_proj, normed),
        )
    )
    looked = F.scaled_dot_product_attention(query, key, value, scale=attention.head_dim**-0.5)
    looked = _part(attention, "o_proj", "out_proj")(looked.transpose(1, 2).flatten(2))
    few = hidden[:, :_ROWS] + _part(layer, "layer_scale1", default=nn.Identity())(looked)
    changed = layer.mlp(_part(layer, "layernorm_after", "norm2", "layer_norm2")(few))
    return few + _part(layer, "layer_scale2", default=nn.Identity())(changed)


def _part(module: nn.Module, *names: str, default: nn.Module | None = None) -> nn.Module:
    """The submodule under the one of its `names` that this family uses."""
    return next((getattr(module, name) for name in names if hasattr(module, name)), default)
