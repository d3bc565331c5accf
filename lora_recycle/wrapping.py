"""PEFT's wrapper around a backbone, without its remarks on what is meant that way, and without casts for nothing."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer


if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn


def wrap(model: nn.Module, config: PeftConfig, **options: Any) -> PeftModel:
    """`peft.get_peft_model`, which changes `model` in place, with the base's name in `config` left as it was.

    PEFT would put the folder that the model was loaded from there, and warn of it. It also asks newer transformers for
    a property by its older name, which warns too.
    """
    name, config.base_model_name_or_path = config.base_model_name_or_path, None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        wrapped = get_peft_model(model, config, **options)
    config.base_model_name_or_path = name
    return wrapped


@contextlib.contextmanager
def autocast(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """`accelerator.autocast()` in which plain LoRA layers take their inputs as they come.

    PEFT makes each input float32, as its weights are, and autocast makes it bfloat16 again: the same numbers, but a
    sixth of the time of a step on a CPU.
    """
    layers = []
    if accelerator.mixed_precision == "bf16":
        layers = [m for m in model.modules() if isinstance(m, LoraLayer) and not m.lora_variant]
    casting = [layer.cast_input_dtype_enabled for layer in layers]
    for layer in layers:
        layer.cast_input_dtype_enabled = False
    try:
        with accelerator.autocast():
            yield
    finally:
        for layer, before in zip(layers, casting, strict=True):
            layer.cast_input_dtype_enabled = before
