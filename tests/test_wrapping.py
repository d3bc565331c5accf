"""bfloat16 without casts to and fro gives the same numbers."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from helpers_tiny import tiny_backbone
from peft import LoraConfig

from lora_recycle.wrapping import autocast, wrap


@pytest.fixture
def bf16():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(mixed_precision="bf16", cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def step(context, model, view, x):
    """Features and the gradients of the adapter, and the types of what reaches the first matrices."""
    seen = []
    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    hooks = [m.lora_A["default"].register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype)) for m in layers]
    model.zero_grad()
    with context:
        features = view.features(x)
    features.float().square().sum().backward()
    for hook in hooks:
        hook.remove()
    return features, [p.grad for p in model.parameters() if p.requires_grad], set(seen)


@pytest.mark.parametrize("use_dora", [False, True])
def test_inputs_are_not_cast_to_and_fro(bf16, use_dora):
    view, x = tiny_backbone(), torch.randn(2, 3, 32, 32)
    config = LoraConfig(r=2, target_modules=["o_proj", "fc2"], use_dora=use_dora, init_lora_weights=False)
    model = wrap(view.model, config)
    features, gradients, cast = step(bf16.autocast(), model, view, x)
    same, same_gradients, seen = step(autocast(bf16, model), model, view, x)
    assert torch.equal(features, same)
    assert all(torch.equal(a, b) for a, b in zip(gradients, same_gradients, strict=True)) and gradients
    assert torch.bfloat16 not in cast and (torch.bfloat16 in seen) == (not use_dora)


def test_layers_cast_again_afterwards(bf16):
    view = tiny_backbone()
    model = wrap(view.model, LoraConfig(r=2, target_modules=["q_proj"]))
    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    with pytest.raises(ZeroDivisionError), autocast(bf16, model):
        assert not any(layer.cast_input_dtype_enabled for layer in layers)
        raise ZeroDivisionError
    assert all(layer.cast_input_dtype_enabled for layer in layers)
