"""One batch of images on its way from the starts to the surrogate images: `step` is one iteration of inversion."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from accelerate import Accelerator

from ..backbones import Backbone
from ..pool import Adapter
from ..relations import relational_divergence
from .config import InversionConfig
from .pixel_spaces import PIXEL_SPACES
from .priors import Prior


@dataclasses.dataclass
class Objective:
    """What the images of one adapter are optimised for: Eq. 1, and a term that makes them hard.

    Attributes:
        backbone: with the adapter folded in.
        adapter: whose head classifies the images.
        prior: the weighted sum of the image priors.
        reference: the network that is not to know the images, where `config.hard_weight` is positive.
        accelerator: gives the autocast of forwards.
    """

    backbone: Backbone
    adapter: Adapter
    config: InversionConfig
    prior: Prior
    reference: Backbone | None
    accelerator: Accelerator

    def __call__(self, images: torch.Tensor, labels: torch.Tensor, prune: dict[int, float] | None) -> torch.Tensor:
        """Loss of images (B, 3, S, S) in [0, 1] that are to be of classes (B,): a scalar."""
        pixel_values = self.backbone.normalize(images)
        with self.accelerator.autocast():
            hidden, _ = self.backbone(pixel_values, prune=prune)
        hidden = hidden.float()
        loss = F.cross_entropy(self.adapter.logits(self.backbone.pool_for_head(hidden)), labels)
        loss = loss + self.prior(images, hidden)
        if self.reference is not None:
            with self.accelerator.autocast():
                other = self.reference.features(pixel_values)
            teacher = self.backbone.pool(hidden)
            loss = loss - self.config.hard_weight * relational_divergence(other, teacher)
        return loss


class InversionBatch:
    """The images of one batch while they are optimised. [`LoraInverter.batch`] makes it.

    Args:
        objective ([`Objective`]): gives the loss of images and labels.
        starts: float (B, 3, S, S) in [0, 1].
        labels: int64 (B,), classes of the adapter's head.
        generator: draws the jitter.
    """

    def __init__(self, objective: Objective, starts: torch.Tensor, labels: torch.Tensor, generator: torch.Generator):
        device, self.config = objective.backbone.device, objective.config
        self.objective, self.labels, self.generator = objective, labels.to(device), generator
        self.space = PIXEL_SPACES[self.config.parameterization](starts.to(device))
        self.optimizer = torch.optim.Adam(self.space.parameters(), lr=self.config.lr, betas=(0.5, 0.99))
        self.iteration = 0

    def step(self) -> torch.Tensor:
        """One whole iteration: images, jitter, forward, backward, Adam. Returns the loss, a scalar on the device."""
        prune = self.config.prune if self.iteration >= self.config.prune_start else None
        loss = self.objective(self._jitter(self.space()), self.labels, prune)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.iteration += 1
        return loss.detach()

    @torch.no_grad()
    def pixels(self) -> torch.Tensor:
        """The images as they are now: uint8 (B, 3, S, S) on the CPU."""
        return (self.space() * 255).round().to(torch.uint8).cpu()

    def _jitter(self, images: torch.Tensor) -> torch.Tensor:
        reach = self.config.jitter
        if reach:
            dy, dx = (torch.randint(0, 2 * reach + 1, (2,), generator=self.generator) - reach).tolist()
            images = images.roll((dy, dx), (-2, -1))
        if self.config.flip and torch.rand((), generator=self.generator) < 0.5:
            images = images.flip(-1)
        return images
