"""The experts of a meta-LoRA as networks beside the shared one, all on the weights of one backbone in memory."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from ..adapters.experts import DomainEntries, ExpertEntry, pull_experts
from ..adapters.load import load_adapter, wear
from ..adapters.peft_wrap import tuner_layers
from ..adapters.pull import AdapterInfo
from ..backbones.backbone import Backbone, check_embeddings
from ..fewshot.domains import SHARED, DomainChoice, Expert, choose_domain
from ..hub.download import HubOptions
from .preprocessing import as_batch, pixel_batches
from .support import without_failures


#: Name of the bare backbone among the looks at a support set.
FROZEN = "frozen"


def bare_copy(backbone: Backbone) -> Backbone:
    """The backbone without any adapter, sharing its weights in memory.

    Separate networks need no switching, so threads can use different ones at once.
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
            networks.append(ExpertNetwork(entry, own, wear(own, adapter)))
        return cls(bare_copy(backbone), networks, entries.reference_spread)

    def __iter__(self) -> Iterator[ExpertNetwork]:
        return iter(self._networks)  # type: ignore[arg-type]  # a ModuleList says Module

    @property
    def names(self) -> list[str]:
        return [network.expert.name for network in self]

    def network(self, name: str) -> Backbone:
        """The backbone that wears the expert of this name."""
        return next(network.backbone for network in self if network.expert.name == name)

    def look(self, shared: Backbone, batches: Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Embeddings (N, D), float32, of batches of normalised images by `FROZEN`, `SHARED` and each expert.

        Args:
            shared: wears the shared adapter.
            batches: (B, 3, H, W) each.

        Raises:
            AdapterError: embeddings are not finite.
            DataError: images hold NaN or infinity.
        """
        networks = {FROZEN: self.frozen, SHARED: shared}
        networks |= {network.expert.name: network.backbone for network in self}
        looks: dict[str, list[torch.Tensor]] = {name: [] for name in networks}
        for pixel_values in batches:
            for name, network in networks.items():
                looks[name].append(network.features(pixel_values.to(shared.device)))
                check_embeddings(looks[name][-1], pixel_values, network.name)
        return {name: torch.cat(parts).float() for name, parts in looks.items()}

    def choose(self, looks: dict[str, torch.Tensor], labels: torch.Tensor) -> DomainChoice:
        """The domain of a support set, from its features (S, D) by `FROZEN`, `SHARED` and each expert."""
        own = {name: looks[name] for name in self.names}
        experts = [network.expert for network in self]
        return choose_domain(looks[FROZEN], looks[SHARED], own, labels, experts, self.reference_spread)

    @torch.inference_mode()
    def embed_chosen(
        self, shared: Backbone, images: Any, names: list[Any], failures: dict[int, str] | None
    ) -> tuple[torch.Tensor, list[Any], DomainChoice]:
        """Support images and their labels, without those that `failures` takes: embeddings (N, D) by the network that
        they choose, the labels that are left, and the choice."""
        if failures is not None:
            failures.clear()  # of an earlier call
        looks = self.look(shared, pixel_batches(as_batch(images), shared, 64, failures))
        kept = without_failures(names, failures or {})
        numbers = {name: number for number, name in enumerate(dict.fromkeys(kept))}
        choice = self.choose(looks, torch.tensor([numbers[name] for name in kept], device=shared.device))
        return looks[choice.name], kept, choice
