"""Whole checkpoints as members of a pool: what was tuned is the checkpoint's weights minus the base model's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from ..backbones.backbone import Backbone
from ..backbones.base_config import CONFIG_FILE
from ..backbones.base_models import WEIGHTS, BaseModel
from ..errors import AdapterError
from ..runtime.files import creating_folder, file_sha256
from ..runtime.outputs import check_output
from .adapter import Adapter
from .checkpoint_files import is_multi_label, is_timm
from .files import HEAD
from .heads import Head
from .keys import PEFT_PREFIX
from .load import check_numbers
from .other_names import take, translate
from .pull import AdapterInfo, describe_checkpoint, file_changed
from .weight_deltas import split_changes


#: From here on a checkpoint is of another base model: as far from the base as one with weights of its own is from
#: nothing. Weights that were trained apart lie at 1 or more, tuned ones at 0.5 or less.
MAX_DISTANCE = 0.75
# settings that change what a model computes and no shape
_SAME = ("num_attention_heads", "hidden_act", "layer_norm_eps", "image_size", "patch_size")


def load_checkpoint(info: AdapterInfo, backbone: Backbone) -> Adapter:
    """The change of all weights that makes `backbone` the checkpoint, exact to rounding, and its head.

    On a backbone without weights only names, shapes and numbers are checked, and nothing changes.

    Raises:
        AdapterError: the checkpoint is of another shape or another base model than `backbone`, weights are missing or
            not finite, or the file changed.
    """
    if file_sha256(info.path / info.file) != info.sha256:
        raise file_changed(info)
    model = _load_tower(info, backbone)
    base = dict(backbone.model.named_parameters())
    tuned = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for name, parameter in sorted(tuned.items()):
        if parameter.shape != base[name].shape:
            raise AdapterError(
                f"{info.where}: {WEIGHTS}: {name} is {tuple(parameter.shape)}, and {tuple(base[name].shape)} in "
                f"{backbone.name}. It was made from another base model{_named(info)}."
            )
    check_numbers(info, tuned)
    head = _head(info)
    if not backbone.has_weights:
        return Adapter(info, {}, {}, head)
    changes = {name: tuned[name] - base[name].detach().float().cpu() for name in tuned}
    distance = _distance(changes, base)
    if distance > MAX_DISTANCE:
        raise AdapterError(
            f"{info.where}: its weights are {distance:.2f} times their own length away from those of {backbone.name}: "
            f"it was made from another base model{_named(info)}. Leave it out, or pool it with others of that base "
            "(base_model=..., --base-model)."
        )
    factors, vector_deltas = split_changes({name: c for name, c in changes.items() if c.any()}, backbone)
    return Adapter(info, factors, vector_deltas, head)


def save_checkpoint(
    folder: str | Path,
    state_dict: Mapping[str, torch.Tensor],
    backbone: Backbone,
    labels: Sequence[str] | None = None,
) -> Path:
    """Write the weights of a tuned model as a checkpoint that a pool takes, and return the folder.

    The way in for adapters that PEFT does not have: merge the adapter into its model, in the code that made it, and
    hand over what the merged model holds.

    Args:
        state_dict: all weights of the image encoder, with or without a `classifier`, under names of transformers, timm
            or OpenCLIP.
        backbone ([`Backbone`]): the base model that was tuned.
        labels (`list[str]`, *optional*): names of the head's classes.

    Raises:
        AdapterError: a weight is missing or of another shape, or it was tuned from another base model.
        StorageError: `folder` is there and not empty, or cannot be written.
    """
    folder = Path(folder)
    check_output(folder)
    kind = type(backbone.model).__name__
    if any(HEAD.fullmatch(PEFT_PREFIX + key) for key in state_dict):
        kind = kind.removesuffix("Model").removesuffix("Vision") + "ForImageClassification"
    config = backbone.model.config.to_dict() | {"architectures": [kind]}
    if labels is not None:
        config["id2label"] = {str(i): str(name) for i, name in enumerate(labels)}
    with creating_folder(folder) as new:
        tensors = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in state_dict.items()}
        save_file(tensors, new / WEIGHTS, metadata={"format": "pt"})
        (new / CONFIG_FILE).write_text(json.dumps(config, default=str), encoding="utf-8")
        load_checkpoint(describe_checkpoint(new, folder.name, None), backbone)
    return folder


def _named(info: AdapterInfo) -> str:
    return f" ({info.base_model}, it says)" if info.base_model else ""


def _distance(changes: dict[str, torch.Tensor], base: dict[str, Any]) -> float:
    """Length of the change of all matrices by the length of the base model's own."""
    names = [name for name, change in changes.items() if change.ndim == 2 and name.endswith(".weight")]
    moved = sum(changes[name].square().sum(dtype=torch.float64).item() for name in names)
    there = sum(base[name].detach().float().square().sum(dtype=torch.float64).item() for name in names)
    return (moved / max(there, 1e-30)) ** 0.5


def _load_tower(info: AdapterInfo, backbone: Backbone) -> PreTrainedModel:
    """The checkpoint's image encoder in float32 on the CPU, whole, of the same kind as the backbone's."""
    own = backbone.model.config
    files = BaseModel(info.where, info.path, info.revision, info.config)
    config = own if is_timm(info.config) else files.tower_config()
    if config.model_type != own.model_type:
        raise AdapterError(
            f"{info.where}: is a {config.model_type} model, and {backbone.name} a {own.model_type} model. Was it made "
            f"from another base model{_named(info)}?"
        )
    for name in _SAME:
        found, wanted = getattr(config, name, None), getattr(own, name, None)
        if found != wanted:
            raise AdapterError(
                f"{info.where}: config.json has {name} {found}, and {backbone.name} has {wanted}: a checkpoint must "
                "be of the same shape as the base model. Leave it out, or name the base model that it was made from."
            )
    return files.load_tower(config=config, rename=lambda tensors: _renamed(tensors, config.model_type))


def _renamed(tensors: dict[str, torch.Tensor], model_type: str) -> dict[str, torch.Tensor]:
    """The tensors under names of transformers, those of timm and OpenCLIP translated."""
    pieces = translate((PEFT_PREFIX + key for key in tensors), model_type)
    return {
        key.removeprefix(PEFT_PREFIX): take(tensors[piece.key.removeprefix(PEFT_PREFIX)], piece)
        for key, piece in pieces.items()
    }


def _head(info: AdapterInfo) -> Head | None:
    if info.num_classes is None:
        return None
    tensors = load_file(info.path / info.file)
    parts = {key.rsplit(".", 1)[-1]: key for key in tensors if HEAD.fullmatch(PEFT_PREFIX + key)}
    found = {part: tensors[key].float() for part, key in parts.items()}
    check_numbers(info, {parts[part]: tensor for part, tensor in found.items()})
    return Head(found["weight"], found.get("bias"), is_multi_label(info.config))
