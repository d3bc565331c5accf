"""FLOPs of a vision transformer from its shapes alone; a multiplication and an addition are two.

What is counted is what torch's `FlopCounterMode` counts with attention: linear layers, the patch embedding, attention.
Norms, activations and priors are left out, a few per cent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from .backbone import Backbone
from .token_selection import num_kept


class Flops(NamedTuple):
    """Of one image: its forward, and the backward to what learns."""

    forward: int
    backward: int

    @property
    def both(self) -> int:
        return self.forward + self.backward


def inversion_flops(backbone: Backbone, prune: Mapping[int, float] | None = None) -> Flops:
    """A forward of all tokens, but for those that `prune` drops (as [`Backbone.forward`] takes it), and the gradient
    of the pixels. The weights learn nothing, so each layer's backward costs its forward, attention's 2.5 times that:
    its gradient computes the map again."""
    tokens = backbone.num_prefix_tokens + backbone.num_patches
    forward = backward = _embedding(backbone, backbone.num_patches)
    for number, layer in enumerate(backbone.layers):
        linear = 2 * tokens * sum(out * width for _, width, out in _linear_layers(layer))
        attention = _attention(backbone, tokens, tokens)
        forward, backward = forward + linear + attention, backward + linear + attention * 5 // 2
        if prune and number in prune:
            looking = tokens if backbone.family.pooler else 1
            forward += _attention(backbone, looking, tokens) // 2  # the row of the map that patches are chosen by
            tokens = min(tokens, backbone.num_prefix_tokens + num_kept(backbone.num_patches, prune[number]))
    return Flops(forward, backward)


def forward_flops(backbone: Backbone, patches: int | None = None) -> int:
    """A forward of one image, or of some of its `patches`, through all layers and all their tokens."""
    patches = backbone.num_patches if patches is None else patches
    tokens = backbone.num_prefix_tokens + patches
    each = [2 * tokens * sum(out * width for _, width, out in _linear_layers(layer)) for layer in backbone.layers]
    return _embedding(backbone, patches) + sum(each) + len(each) * _attention(backbone, tokens, tokens)


def lora_flops(backbone: Backbone, rank: int, patches: int | None = None, first_layer: int = 0) -> Flops:
    """The features of one image, or of some of its `patches`, with a LoRA on all linear layers from `first_layer` on,
    and the gradient of its factors.

    The last layer computes the CLS token alone, where there is one. Nothing before the first LoRA learns, so the
    products that enter it need no gradient. With `first_layer` above 0 the tokens that enter it are given.
    """
    patches = backbone.num_patches if patches is None else patches
    tokens = backbone.num_prefix_tokens + patches
    forward, backward = (0 if first_layer else _embedding(backbone, patches)), 0
    last = len(backbone.layers) - 1
    for number in range(first_layer, last + 1):
        cls_alone = number == last and not backbone.family.pooler
        for name, width, out in _linear_layers(backbone.layers[number]):
            asks = name.endswith(("k_proj", "v_proj"))
            rows = 1 if cls_alone and not asks else tokens
            enters = number == first_layer and (asks or name.endswith("q_proj"))  # its input carries no gradient
            forward += 2 * rows * (width * out + rank * (width + out))
            backward += 2 * rows * (2 * rank * out + rank * width)
            backward += 0 if enters else 2 * rows * (width * out + rank * width)
        attention = _attention(backbone, 1 if cls_alone else tokens, tokens)
        forward, backward = forward + attention, backward + attention * 5 // 2
    pooling = _pooler(backbone, tokens)
    return Flops(forward + pooling, backward + pooling)


def _linear_layers(layer: nn.Module) -> list[tuple[str, int, int]]:
    """Path, inputs and outputs of each linear layer of a transformer layer."""
    modules = layer.named_modules()
    return [(name, m.in_features, m.out_features) for name, m in modules if isinstance(m, nn.Linear)]


def _attention(backbone: Backbone, queries: int, keys: int) -> int:
    """The map of all heads, and the values by it."""
    return 4 * queries * keys * backbone.hidden_size


def _embedding(backbone: Backbone, patches: int) -> int:
    return 2 * patches * 3 * backbone.patch_size**2 * backbone.hidden_size


def _pooler(backbone: Backbone, tokens: int) -> int:
    """SigLIP's attention of one query of its own over all tokens, and the MLP on what it gives."""
    if not backbone.family.pooler:
        return 0
    pooler: Any = backbone.model.get_submodule(backbone.family.pooler)
    linear = sum(2 * width * out for _, width, out in _linear_layers(pooler))
    width = backbone.hidden_size
    return linear + 2 * (2 * tokens + 1) * width**2 + _attention(backbone, 1, tokens)
