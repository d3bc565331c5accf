"""The experts of a meta-LoRA as networks beside the shared one, all on the weights of one backbone in memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from torch import nn

from ..adapters.experts import DomainEntries, ExpertEntry, pull_experts
from ..adapters.load import load_adapter
from ..adapters.peft_wrap import tuner_layers, wrap
from ..adapters.pull import AdapterInfo
from ..backbones.backbone import Backbone
from ..fewshot.domains import SHARED, DomainChoice, Expert, choose_domain
from ..hub.download import HubOptions


#: Name of the bare backbone among the looks at a support set.
FROZEN = "frozen"


def bare_copy(backbone: Backbone) -> Backbone:
    """A backbone without an adapter on the same weights in memory, whether `backbone` wears one or not.

    Networks that stand side by side need no switching, so that threads may each use another one.
    """
    tensors = [*backbone.parameters(), *backbone.buffers()]
    memo: dict[int, Any] = {id(tensor): tensor for tensor in tensors}
    bare = copy.deepcopy(backbone, memo)
    for path, layer in tuner_layers(bare.model).items():
        bare.model.set_submodule(path, layer.base_layer)
    vars(bare.model).pop("peft_config", None)  # PEFT would warn of a second adapter
    return bare.eval()


class ExpertNetwork(nn.Module):
    """A backbone that wears the adapter of one domain.

    Args:
        entry ([`ExpertEntry`]): the domain; its checksums are those of the files that it was loaded from.
        backbone ([`Backbone`]): wears the adapter.
        peft_model: the PEFT model around `backbone.model`.
    """

    def __init__(self, entry: ExpertEntry, backbone: Backbone, peft_model: PeftModel):
        super().__init__()
        self.entry, self.backbone, self.peft_model = entry, backbone, peft_model

    @property
    def expert(self) -> Expert:
        return self.entry.expert


class DomainNetworks(nn.Module):
    """The bare backbone and the experts, beside the shared network of a model.

    Args:
        frozen ([`Backbone`]): wears no adapter.
        experts: one for each domain, in the order of their folders.
        reference_spread: as of [`choose_domain`].
    """

    def __init__(self, frozen: Backbone, experts: Sequence[ExpertNetwork], reference_spread: float):
        super().__init__()
        self.frozen, self.reference_spread = frozen, reference_spread
        self._networks = nn.ModuleList(experts)
        self.eval()

    @classmethod
    def from_entries(
        cls, info: AdapterInfo, entries: DomainEntries, backbone: Backbone, hub: HubOptions
    ) -> DomainNetworks:
        """Load the experts of a pulled meta-LoRA for a backbone that wears no adapter yet.

        Raises:
            AdapterError: one is missing or damaged, or does not fit the backbone; nothing is loaded then.
        """
        loaded = [load_adapter(expert, backbone.model) for expert in pull_experts(info, entries, hub)]
        networks = []
        for entry, adapter in zip(entries.experts, loaded, strict=True):
            own = bare_copy(backbone)
            peft_model = wrap(own.model, adapter.peft_config)
            set_peft_model_state_dict(peft_model, adapter.state_dict)
            peft_model.to(device=backbone.device, dtype=backbone.dtype)
            networks.append(ExpertNetwork(entry, own, peft_model))
        return cls(bare_copy(backbone), networks, entries.reference_spread)

    def __iter__(self) -> Iterator[ExpertNetwork]:
        return iter(self._networks)  # type: ignore[arg-type]  # a ModuleList says Module

    @property
    def names(self) -> list[str]:
        return [network.expert.name for network in self]

    def network(self, name: str) -> Backbone:
        """The backbone that wears the expert of this name."""
        return next(network.backbone for network in self if network.expert.name == name)

    def choose(self, looks: dict[str, torch.Tensor], labels: torch.Tensor) -> DomainChoice:
        """The domain of a support set, from its features (S, D) by `FROZEN`, `SHARED` and each expert."""
        own = {name: looks[name] for name in self.names}
        experts = [network.expert for network in self]
        return choose_domain(looks[FROZEN], looks[SHARED], own, labels, experts, self.reference_spread)
