"""An adapter as what it does to the backbone: changes of weights, or where it has none, PEFT's layers themselves."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import weakref
from collections.abc import Iterator
from typing import Any, TypeAlias, cast

import torch
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .adapter_heads import Head, PooledHead, head_problem
from .backbones import Backbone
from .errors import AdapterError
from .hub.adapters import AdapterInfo, LoadedAdapter, load_adapter
from .wrapping import wrap


#: PEFT's layers by their path: each is a module and a `BaseTunerLayer`, for which there is no one type.
Layers: TypeAlias = dict[str, Any]
#: Module to (B, A), shapes (out, r) and (r, in).
Factors: TypeAlias = dict[str, tuple[torch.Tensor, torch.Tensor]]
#: `factors`, `others` and `layers` of an [`Adapter`].
Parts: TypeAlias = tuple[Factors, dict[str, torch.Tensor], Layers]

#: Backbones that an adapter is folded into just now; what another adapter changes cannot be told from them.
_CHANGED: weakref.WeakSet[Backbone] = weakref.WeakSet()

#: Initialisations that leave the base weights alone, so that the delta is scale * B A and nothing else.
_PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva", None)


@dataclasses.dataclass
class Adapter:
    """One adapter as changes of the backbone's weights, with its head.

    `factors` maps a module to (B, A) with delta W = B A, shapes (out, r) and (r, in). A change of full rank, from an
    adapter that is no plain LoRA, has r = in and A = identity. `others` maps a parameter (bias, norm) to its change.
    `layers` maps a module to the PEFT layer that stands in for it, for types that compute with their input (Lily,
    Poly) and so are no change of weights; the two others are empty then.
    """

    info: AdapterInfo
    factors: Factors
    others: dict[str, torch.Tensor]
    head: Head | None = None
    layers: Layers = dataclasses.field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        return 0 if self.head is None else len(self.head.weight)

    def label(self, index: int) -> str:
        return self.info.labels[index] if self.info.labels else f"class {index}"

    def load(self) -> Adapter:
        """Itself: an adapter that is in memory already takes the place of a [`StoredAdapter`]."""
        return self

    def logits(self, backbone: Backbone, hidden: torch.Tensor) -> torch.Tensor:
        """(B, T, D), the tokens that `backbone` wearing this adapter gives, to (B, C) through the adapter's head."""
        if self.head is None:
            raise AdapterError(f"{self.info.name}: has no classification head, so it cannot say what an image shows.")
        return self.head.logits(backbone, hidden)

    @property
    def headless(self) -> bool:
        return self.head is None

    def with_head(self, head: Head) -> Adapter:
        return dataclasses.replace(self, head=head, info=dataclasses.replace(self.info, prompt=head.prompt))

    def require_head(self, backbone: Backbone) -> None:
        """Raise `AdapterError` where there is no head, or one that reads another width than `backbone` gives it."""
        if problem := head_problem(self.head, backbone):
            raise AdapterError(f"{self.info.where}: {problem}")


class StoredAdapter:
    """An adapter whose tensors stay in their file until they are asked for. It is checked in full when made.

    Args:
        info ([`AdapterInfo`]): from [`pull_adapter`].
        backbone ([`Backbone`]): what the adapter is read for.
        expected (`dict`): shared by the adapters of one backbone, see [`load_adapter`].

    Raises:
        AdapterError: the adapter is damaged or does not fit the backbone.
    """

    def __init__(self, info: AdapterInfo, backbone: Backbone, expected: dict):
        self.info, self.backbone, self.expected = info, backbone, expected
        self._given: Head | None = None
        adapter = self.load()
        self.info = adapter.info  # now with the generation that the model's names showed
        self.headless, self._problem = adapter.headless, head_problem(adapter.head, backbone)

    def load(self) -> Adapter:
        """Read the tensors. Raises `AdapterError` where the file changed, or the backbone wears an adapter now."""
        if self.backbone in _CHANGED:
            raise AdapterError(
                f"{self.info.where}: cannot be read while an adapter is folded into {self.backbone.name}. Take it "
                "from the pool before, or fold it itself."
            )
        adapter = to_adapter(load_adapter(self.info, self.backbone.model, self.expected), self.backbone)
        return adapter if self._given is None else adapter.with_head(self._given)

    def with_head(self, head: Head) -> StoredAdapter:
        """The same adapter with a head that its file lacks."""
        other = copy.copy(self)
        other._given, other.headless, other._problem = head, False, head_problem(head, self.backbone)
        other.info = dataclasses.replace(self.info, prompt=head.prompt)
        return other

    def require_head(self, backbone: Backbone) -> None:
        """As of [`Adapter`], without reading the file again."""
        if self._problem:
            raise AdapterError(f"{self.info.where}: {self._problem}")


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
        factors, others, layers = _lora_factors(loaded, backbone) if plain else _peft_changes(loaded, backbone)
    except Exception as error:  # noqa: BLE001 - PEFT raises anything for tensors that anyone may have written
        raise AdapterError(
            f"{loaded.info.where}: this adapter of type {loaded.info.peft_type} cannot run on {backbone.name}: {error}"
        ) from error
    bounds = [torch.linalg.norm(b) * torch.linalg.norm(a) for b, a in factors.values()]
    if not all(value.isfinite().all() for value in [*bounds, *others.values()]):
        raise AdapterError(f"{loaded.info.where}: its weight changes are not finite.")
    kind = PooledHead if loaded.pooled_head else Head
    head = None if loaded.head_weight is None else kind(loaded.head_weight, loaded.head_bias)
    return Adapter(loaded.info, factors, others, head, layers)


@contextlib.contextmanager
def marked_as_changed(backbone: Backbone) -> Iterator[None]:
    """While `backbone` wears an adapter no other one is read for it."""
    outer = backbone in _CHANGED
    _CHANGED.add(backbone)
    try:
        yield
    finally:
        if not outer:
            _CHANGED.discard(backbone)


class ChangeSum:
    """The sum of adapters' weight changes, in memory that does not grow with their number.

    Of each module it holds factors up to the rank where the change itself, (out, in), is no larger, and that from
    there on.
    """

    def __init__(self) -> None:
        self.others: dict[str, torch.Tensor] = {}
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
        for name, change in adapter.others.items():
            self.others[name] = self.others[name] + change if name in self.others else change

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


@contextlib.contextmanager
def wear_layers(model: nn.Module, layers: Layers) -> Iterator[None]:
    """Put PEFT layers (`Adapter.layers`) around the modules of `model`; they are taken off again."""
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
    return *split_changes({name: change for name, change in changes if change.any()}), {}


def split_changes(changes: dict[str, torch.Tensor]) -> tuple[Factors, dict[str, torch.Tensor]]:
    """Dense changes by parameter as `Adapter.factors`, of full rank, where they are of matrices, and as `others`."""
    factors, others = {}, {}
    for name, change in changes.items():
        if change.ndim == 2 and name.endswith(".weight"):
            eye = torch.eye(change.shape[1], device=change.device)
            factors[name.removesuffix(".weight")] = (change, eye)
        else:
            others[name] = change
    return factors, others


def _wrap(loaded: LoadedAdapter, backbone: Backbone) -> PeftModel:
    """A float32 copy of the backbone on the CPU that wears the adapter the way PEFT does it."""
    wrapped = wrap(copy.deepcopy(backbone.model).float().cpu(), copy.deepcopy(loaded.peft_config))
    set_peft_model_state_dict(wrapped, loaded.state_dict)
    if loaded.info.peft_type == "POLY":
        for layer in tuner_layers(wrapped.get_base_model()).values():
            layer.register_forward_pre_hook(_first_task, with_kwargs=True)
    return wrapped.eval().requires_grad_(False)


def tuner_layers(model: nn.Module) -> Layers:
    """PEFT's layers inside a model, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def _first_task(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Poly asks each layer for the task of each image; adapters of more than one task are refused."""
    task_ids = torch.zeros(len(args[0]), dtype=torch.long, device=args[0].device)
    return args, kwargs | {"task_ids": task_ids}
