"""Adapters read for one live backbone: names, shapes and numbers are checked against what PEFT would save."""

from __future__ import annotations

import copy
import dataclasses
import re
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..backbones.backbone import Backbone
from ..errors import AdapterError
from .files import (
    HEAD,
    POOLED_HEAD,
    read_header,
    without_twins,
)
from .keys import PEFT_PREFIX, rebuild_config, to_backbone_keys, without_training_only
from .other_names import is_split, shape_of, take, translate
from .peft_wrap import wrap
from .pull import AdapterInfo, file_changed, read_tensors


#: Configs whose PEFT model's names and shapes are remembered, about 50 kB each.
MAX_REMEMBERED = 64

# a LoRA on the classifier of the base model itself
_HEAD_LORA = re.compile(
    r"base_model\.model\.((base_model|model|module)\.)*(classifier|head|score|fc)\.(lora_|base_layer\.).*"
)


class WeightsNeeded(AdapterError):
    """Whether an adapter fits cannot be told from the names and shapes of a base model alone."""


@dataclass
class LoadedAdapter:
    """An adapter read for one headless live model.

    Args:
        info (`AdapterInfo`): `generation` is now what the model's names showed.
        peft_config (`PeftConfig`): its `target_modules` are the sorted live module paths that own adapter tensors.
        state_dict (`dict[str, Tensor]`): float32, keys `base_model.model.<live module>...` without an adapter name.
        head_weight (`Tensor`, *optional*): (C, D) float32; D is the hidden size, or twice that for DINOv2.
        head_bias (`Tensor`, *optional*): (C,) float32.
        pooled_head (`bool`): whether the head reads the pooled image, not what the family's classifier reads.
        weights (`dict[str, Tensor]`): parameters of `model` that the adapter holds anew (`modules_to_save`, biases).
        head_change (`tuple[Tensor, Tensor]`, *optional*): scaled (B, A) of a LoRA on the base model's own classifier.
    """

    info: AdapterInfo
    peft_config: PeftConfig
    state_dict: dict[str, Tensor]
    head_weight: Tensor | None
    head_bias: Tensor | None
    pooled_head: bool = False
    weights: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    head_change: tuple[Tensor, Tensor] | None = None


def load_adapter(
    info: AdapterInfo,
    model: PreTrainedModel,
    expected: dict[str, dict[str, Tensor]] | None = None,
    tower: str = "image",
) -> LoadedAdapter:
    """Read a pulled adapter's tensors for the headless `model`, which is not changed.

    Of an adapter of two towers one half is read.

    Load all adapters before one is put on `model`: PEFT replaces modules in place, and their names with them.

    Args:
        info (`AdapterInfo`): from [`pull_adapter`].
        model (`PreTrainedModel`): the headless backbone.
        expected (`dict`, *optional*): kept between calls for the same `model`, it saves building PEFT's model again
            for adapters of a config that was met before, which is most of the time. Filled here, and bounded.
        tower (`str`, *optional*, defaults to `"image"`): or `"text"`, of which `model` is then.

    Raises:
        AdapterError: a tensor is not finite, missing, unexpected or of another shape or kind of number than `model`
            needs; the head is neither `hidden_size` nor twice that wide; or the config would change the base model.
    """
    shapes = without_twins(info.config, read_header(info.path, info.where))
    if (info.path / info.file).stat().st_size != info.size_bytes:
        raise file_changed(info)
    head = _head_keys(info, shapes, model.config.hidden_size)
    own = {PEFT_PREFIX + name: tuple(p.shape) for name, p in model.named_parameters()}
    try:
        tuned_head = {key for key in shapes if _HEAD_LORA.fullmatch(key)}
        used = without_training_only(info.config, shapes.keys() - set(head.values()) - tuned_head)
        pieces = translate(used, model.config.model_type, tower)
        if used and not pieces:
            raise AdapterError("it changes the text tower alone, and an image teaches nothing of that.")
        _check_patterns(info.config, is_split(pieces))
        names, converted = to_backbone_keys(pieces, model)
        # only this type stores its tensors under the base's own names
        anew = {} if info.peft_type == "LN_TUNING" else {key: live for key, live in names.items() if live in own}
        peft_names = {key: live for key, live in names.items() if key not in anew}
        peft_config = rebuild_config(info.config, peft_names, model)
    except AdapterError as error:
        raise AdapterError(f"{info.where}: {info.file}: {error}") from error
    live_shapes = {names[key]: shape_of(shapes[piece.key], piece) for key, piece in pieces.items()}
    for live in anew.values():
        _check_shape(info, live, live_shapes.pop(live), own[live])
    saved = _check_against_model(info, peft_config, live_shapes, model, {} if expected is None else expected)
    tensors = read_tensors(info)  # only now: nothing of an absurd size gets this far
    live_tensors = {names[key]: take(tensors[pieces[key].key], pieces[key]) for key in sorted(names)}
    heads = {part: tensors[key] for part, key in head.items()}
    check_numbers(info, live_tensors | {head[part]: tensor for part, tensor in heads.items()}, saved)
    info = dataclasses.replace(info, generation=4) if converted else info
    return LoadedAdapter(
        info,
        peft_config,
        {key: tensor for key, tensor in live_tensors.items() if key not in anew.values()},
        heads.get("weight"),
        heads.get("bias"),
        pooled_head=POOLED_HEAD in shapes,
        weights={live.removeprefix(PEFT_PREFIX): live_tensors[live] for live in anew.values()},
        head_change=_head_change(info, {key: tensors[key] for key in sorted(tuned_head)}),
    )


def _check_patterns(config: dict[str, Any], split: bool) -> None:
    patterns = [name for name in ("rank_pattern", "alpha_pattern") if config.get(name)]
    if split and patterns:
        raise AdapterError(
            f"it tunes q, k and v as one matrix and sets {patterns[0]}, which does not say how to cut them. Merge it "
            "into its model (merge_and_unload, save_pretrained) and name that checkpoint."
        )


def _check_shape(info: AdapterInfo, key: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if shape != expected:
        raise AdapterError(
            f"{info.where}: {info.file}: {key} must be {expected}, got {shape}. "
            "Was the adapter made for another base model?"
        )


def _head_change(info: AdapterInfo, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    """(B, A), scaled, of a plain LoRA on the classifier.

    Raises:
        AdapterError: it is no plain LoRA, or its two matrices do not fit each other.
    """
    if not tensors:
        return None
    a, b = (next((t for key, t in tensors.items() if f".lora_{part}.weight" in key), None) for part in "AB")
    plain = info.peft_type == "LORA" and len(tensors) == 2 and not info.config.get("use_dora")
    if not plain or a is None or b is None or a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise AdapterError(
            f"{info.where}: {info.file}: {min(tensors)} tunes the classifier in a way that is not read. Merge the "
            "adapter into its model (merge_and_unload, save_pretrained) and name that checkpoint."
        )
    check_numbers(info, tensors)
    patterns = info.config.get("alpha_pattern") or {}
    alpha, rank = patterns.get("classifier", info.config.get("lora_alpha") or a.shape[0]), a.shape[0]
    return b * (alpha / (rank**0.5 if info.config.get("use_rslora") else rank)), a


def _head_keys(info: AdapterInfo, shapes: dict[str, tuple[int, ...]], hidden: int) -> dict[str, str]:
    """Keys of the head's (C, D) `weight` and (C,) `bias`, as far as the file has them."""
    head = {key.rsplit(".", 1)[-1]: key for key in shapes if HEAD.fullmatch(key)}
    width = shapes[head["weight"]][1] if "weight" in head else hidden
    if width not in (hidden, 2 * hidden):
        raise AdapterError(
            f"{info.where}: {info.file}: {head['weight']} reads {width} features, but the model has "
            f"{hidden} (or {2 * hidden} with the mean of its patches). Was it made for another base model?"
        )
    return head


def _check_against_model(
    info: AdapterInfo,
    peft_config: PeftConfig,
    shapes: dict[str, tuple[int, ...]],
    model: nn.Module,
    met: dict[str, dict[str, Tensor]],
) -> dict[str, Tensor]:
    """Build the PEFT model without memory, and compare the names and shapes it would save with the adapter's.

    Returns what PEFT would save, on the meta device; `met` remembers it by config.
    """
    where = f"{info.where}: {info.file}"
    config = repr(peft_config)
    if config not in met:
        try:
            made = _expected_tensors(peft_config, model)
        except WeightsNeeded:
            raise
        except Exception as error:  # noqa: BLE001 - PEFT raises anything for settings that anyone may have written
            raise AdapterError(f"{info.where}: PEFT cannot build this adapter on the model: {error}") from error
        if len(met) >= MAX_REMEMBERED:
            met.clear()
        met[config] = {key: tensor.detach().to("meta") for key, tensor in made.items()}
    expected = met[config]
    for kind, keys in (("lacks", expected.keys() - shapes), ("holds unexpected", shapes.keys() - expected)):
        if keys:
            raise AdapterError(f"{where} {kind} {len(keys)} tensor(s): {', '.join(sorted(keys)[:3])}.")
    for key, shape in sorted(shapes.items()):
        _check_shape(info, key, shape, tuple(expected[key].shape))
    return expected


def check_numbers(info: AdapterInfo, tensors: dict[str, Tensor], expected: dict[str, Tensor] | None = None) -> None:
    """Raise `AdapterError` where a number is NaN or infinite; of keys that are `expected` also where it is of another
    kind, whole or floating point, and of all others where it is not floating point."""
    for key, tensor in tensors.items():
        if expected is not None:
            floating = key not in expected or expected[key].is_floating_point()
            if tensor.is_complex() or tensor.is_floating_point() != floating:
                kind = "floating point" if floating else "whole numbers"
                raise AdapterError(f"{info.where}: {info.file}: {key} must be {kind}, got {tensor.dtype}.")
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"{info.where}: {info.file}: {key} holds NaN or infinity.")


def _expected_tensors(peft_config: PeftConfig, model: nn.Module) -> dict[str, Tensor]:
    """What PEFT would save for such an adapter; the tensors are on the meta device where PEFT can build it there."""
    # the memo makes deepcopy take these for the weights: a copy of the model on the meta device
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in model.parameters()
    }
    memo |= {id(b): b.detach().to("meta") for b in model.buffers()}
    try:
        # a device of this thread's own; PEFT's low_cpu_mem_usage would replace a function of torch for all threads
        with torch.device("meta"):
            return _saved_by_peft(peft_config, copy.deepcopy(model, memo))
    except (NotImplementedError, RuntimeError):  # types whose shapes follow from numbers, the base's or their own
        if any(parameter.is_meta for parameter in model.parameters()):
            raise WeightsNeeded("only the weights of its base model tell the shapes of its tensors.") from None
        return _saved_by_peft(peft_config, copy.deepcopy(model).float().cpu())


def _saved_by_peft(peft_config: PeftConfig, model: nn.Module) -> dict[str, Tensor]:
    return get_peft_model_state_dict(wrap(model, copy.deepcopy(peft_config)), save_embedding_layers=False)


def wear(backbone: Backbone, adapter: LoadedAdapter) -> PeftModel:
    """Wrap a backbone's linear layers in place; gives PEFT's model around it."""
    peft_model = wrap(backbone.model, adapter.peft_config)
    set_peft_model_state_dict(peft_model, adapter.state_dict)
    return peft_model.to(device=backbone.device, dtype=backbone.dtype)
