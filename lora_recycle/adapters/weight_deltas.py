"""An adapter as what it does to the backbone: changes of weights, or where it has none, PEFT's layers themselves."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, TypeAlias, cast

import torch
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from torch import nn

from ..backbones.backbone import Backbone
from ..errors import AdapterError
from .adapter import Adapter, Factors
from .checkpoint_files import config_labels
from .heads import Head, PooledHead
from .load import LoadedAdapter
from .peft_wrap import Layers, never_called, tuner_layers, wrap
from .pull import AdapterInfo


#: `factors`, `vector_deltas` and `peft_layers` of an [`Adapter`].
Parts: TypeAlias = tuple[Factors, dict[str, torch.Tensor], Layers]


#: Initialisations that leave the base weights alone, so that the delta is scale * B A and nothing else.
_PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva", None)


def to_adapter(loaded: LoadedAdapter, backbone: Backbone) -> Adapter:
    """Turn PEFT tensors into weight changes: in closed form for plain LoRA, by merging for every other type.

    On a backbone without weights, where nothing can be merged, adapters of other types have no changes.

    Raises:
        AdapterError: the adapter cannot run on the backbone, or gives numbers that are not finite.
    """
    config = loaded.peft_config
    plain = (
        loaded.info.peft_type == "LORA"
        and not any(getattr(config, setting, None) for setting in ("use_dora", "use_bdlora"))
        and getattr(config, "init_lora_weights", True) in _PLAIN_INITS
        and all(k.endswith((".lora_A.weight", ".lora_B.weight")) and t.ndim == 2 for k, t in loaded.state_dict.items())
    )
    try:
        factors, vector_deltas, layers = _lora_factors(loaded, backbone) if plain else _peft_changes(loaded, backbone)
    except Exception as error:  # noqa: BLE001 - PEFT raises anything for tensors that anyone may have written
        raise AdapterError(
            f"{loaded.info.where}: this adapter of type {loaded.info.peft_type} cannot run on {backbone.name}: {error}"
        ) from error
    if loaded.weights and backbone.has_weights:
        base = dict(backbone.model.named_parameters())
        anew = {name: tensor - base[name].detach().float().cpu() for name, tensor in loaded.weights.items()}
        more = split_changes(anew, backbone)
        factors, vector_deltas = factors | more[0], vector_deltas | more[1]
    bounds = [torch.linalg.norm(b) * torch.linalg.norm(a) for b, a in factors.values()]
    if not all(value.isfinite().all() for value in [*bounds, *vector_deltas.values()]):
        raise AdapterError(f"{loaded.info.where}: its weight changes are not finite.")
    head = _head(loaded, backbone)
    return Adapter(_with_labels(loaded.info, head, backbone), factors, vector_deltas, head, layers)


def _with_labels(info: AdapterInfo, head: Head | None, backbone: Backbone) -> AdapterInfo:
    """The class names of the base model's own classifier, for a head with as many classes and no names."""
    names = (
        config_labels({"labels": backbone.own_head.names}, len(head.weight)) if head and backbone.own_head else None
    )
    return dataclasses.replace(info, labels=names) if names and not info.labels else info


def _head(loaded: LoadedAdapter, backbone: Backbone) -> Head | None:
    """The adapter's own head, or that of the base model with the LoRA on it."""
    if loaded.head_weight is not None:
        return (PooledHead if loaded.pooled_head else Head)(loaded.head_weight, loaded.head_bias)
    own, change = backbone.own_head, loaded.head_change
    if own is None or change is None or (len(change[0]), change[1].shape[1]) != tuple(own.weight.shape):
        return None
    return Head(own.weight + change[0] @ change[1], own.bias)


class ChangeSum:
    """The sum of adapters' weight changes, in memory that does not grow with their number.

    Of each module it holds factors up to the rank where the change itself, (out, in), is no larger, and that from
    there on.
    """

    def __init__(self) -> None:
        self.vector_deltas: dict[str, torch.Tensor] = {}
        self._factors: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._dense: dict[str, torch.Tensor] = {}

    @property
    def modules(self) -> list[str]:
        return sorted(self._factors)

    def add(self, adapter: Adapter) -> None:
        for module, (b, a) in adapter.factors.items():
            parts = self._factors.setdefault(module, [])
            parts.append((b, a))
            if len(parts) > 1 and sum(b.shape[1] for b, _ in parts) > min(len(b), a.shape[1]):
                self._dense[module] = self.delta(module)
                parts.clear()
        for name, change in adapter.vector_deltas.items():
            self.vector_deltas[name] = self.vector_deltas[name] + change if name in self.vector_deltas else change

    def factors(self, module: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(B, A) of the sum, or None where the change itself is held."""
        return None if module in self._dense else self._concatenated(module)

    def delta(self, module: str) -> torch.Tensor:
        """The sum itself, (out, in)."""
        dense = self._dense.get(module)
        if dense is not None and not self._factors[module]:
            return dense
        b, a = self._concatenated(module)
        return b @ a if dense is None else dense + b @ a

    def _concatenated(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        parts = self._factors[module]
        return torch.cat([b for b, _ in parts], 1), torch.cat([a for _, a in parts])


def _lora_factors(loaded: LoadedAdapter, backbone: Backbone) -> Parts:
    config, idle = cast(LoraConfig, loaded.peft_config), never_called(backbone.model)
    factors: Factors = {}
    for key, a in loaded.state_dict.items():
        if not key.endswith(".lora_A.weight"):
            continue
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        b, rank = loaded.state_dict[key.replace(".lora_A.", ".lora_B.")], a.shape[0]
        alpha = (config.alpha_pattern or {}).get(module, config.lora_alpha)
        scale = alpha / (rank**0.5 if config.use_rslora else rank)
        if module not in idle:
            factors[module] = (b * scale, a)
    return factors, {}, {}


@torch.no_grad()
def _peft_changes(loaded: LoadedAdapter, backbone: Backbone) -> Parts:
    """What merging changes, where that says all: the merged model must answer as PEFT's own does, else its layers."""
    if not backbone.has_weights:
        return {}, {}, {}
    base = {name: p.detach().float().cpu() for name, p in backbone.model.named_parameters()}
    image = torch.randn(1, 3, backbone.image_size, backbone.image_size, generator=torch.Generator().manual_seed(0))
    # indices come from a file too
    with torch.sparse.check_sparse_tensor_invariants():
        wrapped = _wrap(loaded, backbone)
        answer = wrapped(image).last_hidden_state
        try:
            merged = wrapped.merge_and_unload()
            for path in never_called(merged):
                merged.get_submodule(path).load_state_dict(backbone.model.get_submodule(path).state_dict())
            exact = torch.linalg.norm(merged(image).last_hidden_state - answer) <= 1e-3 * torch.linalg.norm(answer)
        except (AttributeError, NotImplementedError):
            exact = False
    if not exact:
        layers = tuner_layers(_wrap(loaded, backbone).get_base_model())
        for layer in layers.values():
            layer.base_layer = None
        return {}, {}, layers
    changes = ((name, p.detach().float() - base[name]) for name, p in merged.named_parameters())
    return *split_changes({name: change for name, change in changes if change.any()}, backbone), {}


def split_changes(changes: dict[str, torch.Tensor], backbone: Backbone) -> tuple[Factors, dict[str, torch.Tensor]]:
    """Dense changes by parameter: of linear layers as `Adapter.factors`, of full rank, the rest as `vector_deltas`."""
    linear = {f"{name}.weight" for name, m in backbone.model.named_modules() if isinstance(m, nn.Linear)}
    linear -= {f"{name}.weight" for name in never_called(backbone.model)}
    factors, vector_deltas = {}, {}
    for name, change in changes.items():
        if name in linear:
            factors[name.removesuffix(".weight")] = full_factors(change)
        else:
            vector_deltas[name] = change
    return factors, vector_deltas


def full_factors(change: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, in) as a product B A without loss; the smaller of the two is the identity."""
    eye = torch.eye(min(change.shape), device=change.device)
    return (eye, change) if change.shape[0] < change.shape[1] else (change, eye)


def _wrap(loaded: LoadedAdapter, backbone: Backbone) -> PeftModel:
    """A float32 copy of the backbone on the CPU that wears the adapter the way PEFT does it."""
    wrapped = wrap(copy.deepcopy(backbone.model).float().cpu(), copy.deepcopy(loaded.peft_config))
    set_peft_model_state_dict(wrapped, loaded.state_dict)
    if loaded.info.peft_type == "POLY":
        for layer in tuner_layers(wrapped.get_base_model()).values():
            layer.register_forward_pre_hook(_first_task, with_kwargs=True)
    return wrapped.eval().requires_grad_(False)


def _first_task(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Poly asks each layer for the task of each image; adapters of more than one task are refused."""
    task_ids = torch.zeros(len(args[0]), dtype=torch.long, device=args[0].device)
    return args, kwargs | {"task_ids": task_ids}
