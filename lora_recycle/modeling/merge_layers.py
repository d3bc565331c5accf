"""An adapter folded into the weights, its layers taken off: the forward is the bare backbone's again."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import torch
from peft import PeftModel

from ..adapters.peft_wrap import Layers, never_called, tuner_layers, wear_layers
from ..backbones.backbone import Backbone
from ..errors import AdapterError


#: Largest relative change of the hidden states that merging may make: rounding, of weights in half precision too.
_ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-6}
_HALF_ROUNDING = 5e-2


@torch.no_grad()
def merge_layers(backbone: Backbone) -> Layers:
    """Fold PEFT's layers into the modules that they stand around, and put those back in their place.

    PEFT's own merged layers would still cost tens of Python calls at each forward, so they go altogether.

    Returns:
        The layers by path, for [`worn_for_saving`].

    Raises:
        AdapterError: the merged backbone gives other outputs. It is restored.
    """
    model = backbone.model
    layers, idle = tuner_layers(model), never_called(model)
    saved = {name: p.detach().clone() for name, p in model.named_parameters() if ".base_layer." in name}
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 3, backbone.image_size, backbone.image_size, generator=generator).to(backbone.device)
    answer = backbone(image)[0]
    try:
        for path, layer in layers.items():
            if path not in idle:
                layer.merge()
            model.set_submodule(path, layer.base_layer)
        gap = torch.linalg.norm((backbone(image)[0] - answer).float()) / torch.linalg.norm(answer.float())
        exact = bool(gap <= _ROUNDING.get(backbone.dtype, _HALF_ROUNDING))
    except (AttributeError, NotImplementedError, ValueError):  # how PEFT says that a type cannot be merged
        exact = False
    if exact:
        for layer in layers.values():
            layer.base_layer = None  # the backbone's memory is not the adapter's to keep
        return layers
    for path, layer in layers.items():
        model.set_submodule(path, layer)
        layer.merged_adapters = []
    for name, parameter in model.named_parameters():
        if name in saved:
            parameter.copy_(saved[name])
    raise AdapterError(
        f"{backbone.name}: this adapter cannot be folded into the weights without changing what it says. "
        "Use the model without merge()."
    )


@contextlib.contextmanager
def worn_for_saving(peft_model: PeftModel, layers: Layers) -> Iterator[PeftModel]:
    """The PEFT model with the `layers` that merging took off back in place, on copies of the modules that share all
    weights: threads that predict meanwhile must not meet layers that come and go."""
    if not layers:
        yield peft_model
        return
    tensors = [t for module in (peft_model, *layers.values()) for t in (*module.parameters(), *module.buffers())]
    copied, layers = copy.deepcopy((peft_model, layers), {id(tensor): tensor for tensor in tensors})
    with wear_layers(copied.get_base_model(), layers):
        yield copied
