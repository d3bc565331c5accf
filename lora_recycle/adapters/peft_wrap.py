"""PEFT's wrapper around a backbone, without its remarks on what is meant that way."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any, TypeAlias

from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..backbones.base_models import LOADING


def wrap(model: nn.Module, config: PeftConfig, **options: Any) -> PeftModel:
    """`peft.get_peft_model`, which changes `model` in place, with the base's name in `config` left as it was.

    PEFT would put the folder that the model was loaded from there, and warn of it. It also asks newer transformers for
    a property by its older name, which warns too. One thread at a time: filters of warnings are the process's.
    """
    name, config.base_model_name_or_path = config.base_model_name_or_path, None
    with LOADING, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        wrapped = get_peft_model(model, config, **options)
    config.base_model_name_or_path = name
    return wrapped


#: PEFT's layers by their path: each is a module and a `BaseTunerLayer`, for which there is no one type.
Layers: TypeAlias = dict[str, Any]


@contextlib.contextmanager
def wear_layers(model: nn.Module, layers: Layers) -> Iterator[None]:
    """Put PEFT layers (`Adapter.peft_layers`) around the modules of `model`; they are taken off again."""
    own = {path: model.get_submodule(path) for path in layers}
    try:
        for path, layer in layers.items():
            layer.base_layer = own[path]
            layer.to(own[path].get_parameter("weight"))
            model.set_submodule(path, layer)
        yield
    finally:
        for path, module in own.items():
            model.set_submodule(path, module)
            layers[path].base_layer = None  # the backbone's memory is not the adapter's to keep


def never_called(model: nn.Module) -> set[str]:
    """Modules whose weights their parent reads itself, so that an adapter on them has no effect in PEFT."""
    return {f"{path}.out_proj" for path, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)}


def tuner_layers(model: nn.Module) -> Layers:
    """PEFT's layers inside a model, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
