"""PEFT's wrapper around a backbone, without its remarks on what is meant that way."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from peft import PeftConfig, PeftModel, get_peft_model

from .base_models import LOADING


if TYPE_CHECKING:
    from torch import nn


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
