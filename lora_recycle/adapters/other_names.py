"""Names that other libraries give to the same layers, turned into those of transformers: timm, OpenCLIP, wrappers.

timm and OpenCLIP keep q, k and v of a layer in one matrix. What tunes it is cut into three: rows of B (and of a
weight, a bias, a DoRA's magnitudes) are the outputs, and A, which reads the input, is shared by all three.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

import torch

from ..errors import AdapterError


#: What PEFT puts before the path of a module of the base model.
PEFT_PREFIX = "base_model.model."
#: Attributes under which other libraries, and users' own classes, keep the image encoder or the whole classifier.
WRAPPERS = frozenset(
    (
        *("model", "module", "_orig_mod", "base_model", "backbone", "net", "network", "feature_extractor", "trunk"),
        *("image_encoder", "vision_encoder", "vision_tower", "vision_model", "visual"),
        *("vit", "deit", "dinov2", "dinov2_with_registers", "clip", "siglip"),
    )
)

# per model type: where layers lie, and what its norms and layer scales are called
_VIT = ("layers", "layernorm_before", "layernorm_after")
_PLACES = {
    "vit": _VIT,
    "deit": _VIT,
    "dinov2": ("encoder.layer", "norm1", "norm2"),
    "dinov2_with_registers": ("encoder.layer", "norm1", "norm2"),
}
_TIMM = (
    (r"blocks\.(\d+)\.norm1", r"{layers}.\1.{before}"),
    (r"blocks\.(\d+)\.norm2", r"{layers}.\1.{after}"),
    (r"blocks\.(\d+)\.attn\.qkv", r"{layers}.\1.attention.[qkv]_proj"),
    (r"blocks\.(\d+)\.attn\.proj", r"{layers}.\1.attention.o_proj"),
    (r"blocks\.(\d+)\.mlp\.(fc[12])", r"{layers}.\1.mlp.\2"),
    (r"blocks\.(\d+)\.ls([12])\.gamma", r"{layers}.\1.layer_scale\2.lambda1"),
    (r"patch_embed\.proj", r"embeddings.patch_embeddings.projection"),
    (r"cls_token", r"embeddings.cls_token"),
    (r"dist_token", r"embeddings.distillation_token"),
    (r"pos_embed", r"embeddings.position_embeddings"),
    (r"mask_token", r"embeddings.mask_token"),
    (r"norm", r"layernorm"),
    (r"head", r"classifier"),
)
_BLOCK = r"transformer\.resblocks\.(\d+)\."
_OPEN_CLIP = (
    (_BLOCK + r"ln_([12])", r"encoder.layers.\1.layer_norm\2"),
    (_BLOCK + r"attn\.(?:base_layer\.)?out_proj", r"encoder.layers.\1.self_attn.out_proj"),
    (_BLOCK + r"attn\.in_proj_(weight|bias)", r"encoder.layers.\1.self_attn.[qkv]_proj.\2"),
    (_BLOCK + r"attn(?=\.lora_)", r"encoder.layers.\1.self_attn.[qkv]_proj"),
    (_BLOCK + r"mlp\.c_fc", r"encoder.layers.\1.mlp.fc1"),
    (_BLOCK + r"mlp\.c_proj", r"encoder.layers.\1.mlp.fc2"),
    (r"conv1", r"embeddings.patch_embedding"),
    (r"class_embedding", r"embeddings.class_embedding"),
    (r"positional_embedding", r"embeddings.position_embedding.weight"),
    (r"ln_pre", r"pre_layrnorm"),
    (r"ln_post", r"post_layernorm"),
)
_FUSED, _QKV = "[qkv]_proj", ("q_proj", "k_proj", "v_proj")
# PEFT merges this change twice into torch's MultiheadAttention, in training as in use
_TWICE = ".attn.base_layer.out_proj.lora_B.weight"
_ROWS = re.compile(r"\.(weight|bias|lora_B\.(weight|bias)|lora_magnitude_vector(\.weight)?|hada_w[12]_a)$")
_SHARED = re.compile(r"\.(lora_A\.weight|hada_w[12]_b)$")
_TEXT_TOWER = "text_model."
_TEXT = re.compile(r"text_model\.|text_projection|logit_scale|logit_bias|token_embedding|ln_final|attn_mask")


class Piece(NamedTuple):
    """A tensor of a file, or a third of its rows: 0 for q, 1 for k, 2 for v; times `scale`."""

    key: str
    third: int | None = None
    scale: float = 1.0


def translate(keys: Iterable[str], model_type: str, tower: str = "image") -> dict[str, Piece]:
    """Names as transformers would give them to the piece of the file that belongs there; others stay as they are.

    Of a model with two towers only one is kept.

    Args:
        keys: of the file, all with PEFT's prefix, or none that begins with it.
        model_type: of the backbone.
        tower: `"image"` or `"text"`, whose names then begin below `text_model.`.

    Raises:
        AdapterError: an adapter tunes q, k and v as one matrix in a way that is not made of rows, or of the text half
            something else than the text tower.
    """
    bare = {key: key.removeprefix(PEFT_PREFIX) for key in keys}
    if tower == "text":
        return _text_half(bare)
    rules: tuple[tuple[str, str], ...] = ()
    if any(re.search(r"(^|\.)visual\.(conv1|transformer)\.", name) for name in bare.values()):
        rules = _OPEN_CLIP
        bare = {key: "visual." + name.rpartition("visual.")[2] for key, name in bare.items() if "visual." in name}
        bare = {key: name for key, name in bare.items() if name != "visual.proj"}
    elif model_type in _PLACES and any(re.search(r"(^|\.)blocks\.\d+\.", name) for name in bare.values()):
        layers, before, after = _PLACES[model_type]
        rules = tuple((r, t.format(layers=layers, before=before, after=after)) for r, t in _TIMM)
    pieces: dict[str, Piece] = {}
    for key, name in bare.items():
        if _TEXT.match(_unwrapped(name)):
            continue
        prefix = key[: len(PEFT_PREFIX)] if key.startswith(PEFT_PREFIX) else ""
        name = re.sub(r"\.modules_to_save(\.\w+)?\.", ".", name).replace(".base_layer.bias", ".bias")
        for new, third in _by_rules(name, rules):
            pieces[prefix + new] = Piece(key, third, 2.0 if key.endswith(_TWICE) else 1.0)
    return pieces


def has_text_half(keys: Iterable[str]) -> bool:
    """Whether an adapter of CLIP or SigLIP changes what its texts become."""
    return any(_TEXT.match(_unwrapped(key.removeprefix(PEFT_PREFIX))) for key in keys)


def _text_half(bare: dict[str, str]) -> dict[str, Piece]:
    half = {key: inner for key, name in bare.items() if _TEXT.match(inner := _unwrapped(name))}
    if outside := [key for key, inner in half.items() if not inner.startswith(_TEXT_TOWER)]:
        raise AdapterError(f"{min(outside)}: of what makes a text's embedding only its tower may be tuned here.")
    return {PEFT_PREFIX + inner.removeprefix(_TEXT_TOWER): Piece(key) for key, inner in half.items()}


def is_split(pieces: dict[str, Piece]) -> bool:
    """Whether a tensor of the file was cut, so that its patterns of modules mean something else."""
    return any(piece.third is not None for piece in pieces.values())


def take(tensor: torch.Tensor, piece: Piece) -> torch.Tensor:
    """The piece of its tensor."""
    tensor = tensor if piece.third is None else tensor.chunk(3)[piece.third].clone()
    return tensor if piece.scale == 1 else tensor * piece.scale


def shape_of(shape: tuple[int, ...], piece: Piece) -> tuple[int, ...]:
    """The piece's shape, of its tensor's."""
    return shape if piece.third is None else (shape[0] // 3, *shape[1:])


def _unwrapped(name: str) -> str:
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts) if part not in WRAPPERS), 0)
    return ".".join(parts[first:])


def _by_rules(name: str, rules: tuple[tuple[str, str], ...]) -> list[tuple[str, int | None]]:
    inner = _unwrapped(name)
    for rule, template in rules:
        match = re.match(rf"(?:{rule})(?=\.|$)", inner)
        if match is None:
            continue
        new, rest = match.expand(template), inner[match.end() :]
        if _FUSED not in new:
            return [(new + rest, None)]
        names = [new.replace(_FUSED, part) + rest for part in _QKV]
        if _SHARED.search(names[0]):
            return [(part, None) for part in names]
        if not _ROWS.search(names[0]):
            raise AdapterError(
                f"{name}: tunes q, k and v as one matrix, in a way that cannot be cut into three. Merge the adapter "
                "into its model (merge_and_unload, save_pretrained) and name that checkpoint."
            )
        return [(part, third) for third, part in enumerate(names)]
    return [(name, None)]
