"""One batch of images on its way from the starts to the surrogate images: `step` is one iteration of inversion."""

from __future__ import annotations

import dataclasses

import torch
from accelerate import Accelerator

from ..adapters.adapter import Adapter
from ..backbones.backbone import Backbone
from .config import InversionConfig
from .pixel_spaces import PIXEL_SPACES
from .priors import Prior


#: iterations between two looks at which images are finished: each look waits for the device
STOP_EVERY = 5


@dataclasses.dataclass
class Objective:
    """What the images of one adapter are optimised for (Eq. 1).

    Attributes:
        backbone: with the adapter folded in, while a batch is stepped.
        adapter: whose head classifies the images.
        prior: the weighted sum of the image priors.
        accelerator: gives the autocast of forwards.
    """

    backbone: Backbone
    adapter: Adapter
    config: InversionConfig
    prior: Prior
    accelerator: Accelerator

    def __call__(
        self, images: torch.Tensor, labels: torch.Tensor, prune: dict[int, float] | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss, a scalar, and logits (B, C) of images (B, 3, S, S) in [0, 1] that are to be of classes (B,)."""
        pixel_values = self.backbone.normalize(images)
        with self.accelerator.autocast():
            hidden, _ = self.backbone(pixel_values, prune=prune)
        hidden = hidden.to(self.backbone.dtype)  # float32 again after autocast
        logits = self.adapter.logits(self.backbone, hidden).float()
        loss = self.adapter.own_head().loss(logits, labels) + self.prior(images, hidden.float())
        return loss, logits


class InversionBatch:
    """The images of one batch while they are optimised. [`LoRAInverter.batch`] makes it.

    Args:
        objective ([`Objective`]): gives the loss of images and labels.
        starts: float (B, 3, S, S) in [0, 1].
        labels: int64 (B,), classes of the adapter's head.
        generator: draws the jitter.
    """

    def __init__(self, objective: Objective, starts: torch.Tensor, labels: torch.Tensor, generator: torch.Generator):
        device, self.config = objective.backbone.device, objective.config
        self.objective, self.labels, self.generator = objective, labels.to(device), generator
        self.space = PIXEL_SPACES[self.config.parameterization](starts.to(device), objective.backbone.std)
        self.optimizer = torch.optim.Adam(self.space.parameters(), lr=self.config.lr, betas=(0.5, 0.99))
        self.size, self.iteration = len(labels), 0
        self._logits: torch.Tensor | None = None

    def step(self) -> torch.Tensor:
        """One whole iteration: images, jitter, forward, backward, Adam, projection.

        Returns the loss, a scalar on the device.
        """
        prune = self.config.prune if self.iteration >= self.config.prune_start else None
        loss, logits = self.objective(self._jitter(self.space()), self.labels, prune)
        self.optimizer.zero_grad(set_to_none=True)
        (loss * (len(self.labels) / self.size)).backward()  # an image's gradient is not to grow when others leave
        self.optimizer.step()
        self.space.project()
        self.iteration += 1
        self._logits = logits.detach()
        return loss.detach()

    def finished(self) -> torch.Tensor:
        """Which images need no more steps, bool (B,) on the CPU: all after the last iteration, before that those to
        which the adapter gave a probability of `config.stop_at` for their class at the last step, as it saw them."""
        if self.iteration >= self.config.iterations:
            return torch.ones(len(self.labels), dtype=torch.bool)
        if self.config.stop_at == 1 or self.iteration % STOP_EVERY:
            return torch.zeros(len(self.labels), dtype=torch.bool)
        assert self._logits is not None  # the iteration is above 0
        confidence = (
            self.objective.adapter.own_head().probabilities(self._logits).gather(1, self.labels[:, None])[:, 0]
        )
        return (confidence >= self.config.stop_at).cpu()

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these images only: bool (B,). Adam keeps what it knows of them."""
        rows = rows.to(self.labels.device)
        self.labels = self.labels[rows]
        for parameter in self.space.parameters():
            state = self.optimizer.state[parameter]
            parameter.grad, parameter.data = None, parameter.data[rows]
            state.update({name: state[name][rows] for name in ("exp_avg", "exp_avg_sq")})

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
