"""The networks that adapters make of one backbone: the shared one, the experts, and the shared one merged."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from peft import PeftModel
from torch import nn

from ..adapters.peft_wrap import Layers
from ..backbones.backbone import Backbone, check_embeddings
from ..errors import ConfigError
from ..fewshot.domains import SHARED
from .domains import DomainNetworks
from .merge_layers import merge_layers
from .preprocessing import as_batch, pixel_batches, to_pixel_values


Self = TypeVar("Self", bound="AdaptedNetworks")


class AdaptedNetworks(nn.Module):
    """Images to embeddings, by the network of one domain.

    Args:
        backbone ([`Backbone`]): of the shared network; its linear layers are wrapped by PEFT in place.
        peft_model: the PEFT model around `backbone.model`; None of a bare one.
        domain_networks ([`DomainNetworks`], *optional*): the experts.
    """

    def __init__(
        self, backbone: Backbone, peft_model: PeftModel | None, domain_networks: DomainNetworks | None = None
    ):
        super().__init__()
        self.backbone, self.peft_model, self.domain_networks = backbone, peft_model, domain_networks
        #: PEFT's layers after `merge`, by the module that each stood around
        self._merged: Layers = {}
        #: whose network that was
        self._merged_domain = SHARED

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    @property
    def domains(self) -> list[str]:
        """The domains that `fit` chooses from: `shared` and the experts. Empty without experts."""
        return [] if self.domain_networks is None else [SHARED, *self.domain_networks.names]

    def network(self, domain: str | None = None) -> Backbone:
        """The backbone with the adapter of a domain applied; by default the domain of the fitted task.

        Raises:
            ConfigError: there is no such domain, or another one is folded into the weights that all share.
        """
        name = self._current() if domain is None else self._known(domain)
        if self._merged and name != self._merged_domain:
            raise ConfigError(
                f"The model is merged into the domain {self._merged_domain!r}, so it cannot use {name!r}. Load it "
                "again."
            )
        if name == SHARED or self.domain_networks is None:
            return self.backbone
        return self.domain_networks.network(name)

    def _current(self) -> str:
        """The domain whose network is used where none is named."""
        return self._merged_domain

    def _known(self, domain: str) -> str:
        if domain != SHARED and domain not in self.domains:
            known = ", ".join(map(repr, self.domains)) or f"{SHARED!r} alone"
            raise ConfigError(f"There is no domain {domain!r}; this model has {known}.")
        return domain

    def merge(self: Self) -> Self:
        """Fold the meta-LoRA into the backbone's weights, for use: a forward then costs what the bare backbone's does.

        Answers stay the same up to rounding. Fitting and saving go on as before (the adapter is kept beside the
        weights and saved as it is), training does not. To undo it, load the model again.

        Of a model with experts it is the network of the fitted task's domain, of an unfitted one the shared network,
        and from then on `fit` keeps to it: fit first, then merge.

        Raises:
            AdapterError: the adapter's type cannot be merged into weights; the model is unchanged.
        """
        if not self._merged:
            domain = self._current()
            self._merged, self._merged_domain = merge_layers(self.network(domain)), domain
        return self

    def features(self, pixel_values: torch.Tensor, domain: str | None = None) -> torch.Tensor:
        """Normalised images (B, 3, H, W) to embeddings (B, D), by the network of a domain, by default of the fitted
        task's."""
        return self.network(domain).features(pixel_values.to(self.device))

    def _embeddings(self, pixel_values: torch.Tensor, domain: str | None = None) -> torch.Tensor:
        """`features`, checked to be finite."""
        features = self.features(pixel_values, domain)
        check_embeddings(features, pixel_values, self.backbone.name)
        return features

    def preprocess(self, images: Any) -> torch.Tensor:
        """What `features` and `forward` take: images in any form that `fit` takes to normalised (N, 3, S, S)."""
        return to_pixel_values(as_batch(images), self.backbone)

    @torch.inference_mode()
    def embed(
        self,
        images: Any,
        batch_size: int = 64,
        *,
        failures: dict[int, str] | None = None,
        progress: bool = False,
        domain: str | None = None,
    ) -> torch.Tensor:
        """Images in any form that `fit` takes to embeddings (N, D) on the model's device.

        Files are decoded by threads, at most two batches ahead, so that their number does not matter to memory.

        Args:
            failures: takes the number and the error of each image that cannot be read, which is left out.
            domain (`str`, *optional*): whose network embeds them; by default that of the fitted task.

        Raises:
            AdapterError: the embeddings are not finite.
            ConfigError: there is no such domain.
        """
        domain = self._current() if domain is None else domain  # one for all batches, whatever is fitted meanwhile
        batches = pixel_batches(as_batch(images), self.backbone, batch_size, failures, progress)
        parts = [self._embeddings(pixel_values, domain) for pixel_values in batches]
        if not parts:  # all of them failed
            return torch.zeros(0, self.backbone.hidden_size, device=self.device)
        return parts[0] if len(parts) == 1 else torch.cat(parts)
