"""Ways to need fewer iterations of inversion that did not pay, so that the library has no settings for them.

They are here for `examples/studies/efficiency.py` to measure.
"""

from __future__ import annotations

import torch

from lora_recycle import LoRAInverter
from lora_recycle.inversion import inverter
from lora_recycle.inversion.batch import InversionBatch


class PreviousBatch(LoRAInverter):
    """The images of an adapter, one batch, start where those of the adapter before ended."""

    _before: torch.Tensor | None = None

    def invert(self, index):
        shard = super().invert(index)
        self._before = shard.pixels
        return shard

    def batch(self, index, starts, labels, generator) -> InversionBatch:
        if self._before is not None:
            starts = self._before[: len(starts)].float() / 255
        return super().batch(index, starts, labels, generator)


class Mixtures(LoRAInverter):
    """Every image starts from a random mixture of two of the given starts."""

    def batch(self, index, starts, labels, generator) -> InversionBatch:
        weights = torch.rand(len(starts), 1, 1, 1, generator=generator)
        return super().batch(index, weights * starts + (1 - weights) * starts.roll(1, 0), labels, generator)


class LbfgsBatch(InversionBatch):
    """L-BFGS in place of Adam, one forward and backward an iteration, with a curvature of its own for each image.

    The two-loop recursion (Nocedal 1980), every product of vectors taken image by image; pairs of negative curvature
    are left out. A step is cut to a root mean square of `config.lr`, which also is the length of the first one: a line
    search would cost more forwards than it saves.
    """

    history = 8

    def __init__(self, *args):
        super().__init__(*args)
        self.pairs: list[tuple[torch.Tensor, torch.Tensor]] = []  # steps and changes of the gradient, (B, N) each
        self.last: tuple[torch.Tensor, torch.Tensor] | None = None

    def step(self) -> torch.Tensor:
        parameters = list(self.space.parameters())
        loss, self._logits = self.objective(self._jitter(self.space()), self.labels, self.config.prune)
        grads = torch.autograd.grad(loss * len(self.labels), parameters)
        gradient = torch.cat([grad.flatten(1) for grad in grads], 1)
        if self.last is not None:
            self.pairs = [*self.pairs, (self.last[0], gradient - self.last[1])][-self.history :]
        step = -self._preconditioned(gradient)
        step = step * (self.config.lr / step.square().mean(1, keepdim=True).sqrt()).clamp(max=1)
        with torch.no_grad():
            for parameter, part in zip(parameters, step.split([p[0].numel() for p in parameters], 1), strict=True):
                parameter += part.view_as(parameter)
        self.last, self.iteration = (step, gradient), self.iteration + 1
        return loss.detach()

    def keep(self, rows: torch.Tensor) -> None:
        assert not rows.any()  # all images end together: there is nothing to go on with

    def _preconditioned(self, gradient: torch.Tensor) -> torch.Tensor:
        """The inverse Hessian, as the pairs tell it, times the gradient: (B, N)."""
        found, used = gradient, []
        scale = torch.full_like(gradient[:, :1], torch.inf)  # no curvature known: the cut decides
        for step, change in reversed(self.pairs):
            curvature = (step * change).sum(1, keepdim=True)
            bends = curvature > 1e-10 * change.square().sum(1, keepdim=True)
            rate = torch.where(bends, 1 / curvature, 0)
            along = rate * (step * found).sum(1, keepdim=True)
            found = found - along * change
            newest = bends & scale.isinf()
            scale = torch.where(newest, curvature / change.square().sum(1, keepdim=True), scale)
            used.append((step, change, rate, along))
        found = torch.where(scale.isinf(), 1e6, scale) * found
        for step, change, rate, along in reversed(used):
            found = found + step * (along - rate * (change * found).sum(1, keepdim=True))
        return found


class Lbfgs(LoRAInverter):
    """Inversion by [`LbfgsBatch`]."""

    def batch(self, index, starts, labels, generator) -> InversionBatch:
        parts = (self.backbone, self.pool[index], self.config, self.prior, self.accelerator)
        return LbfgsBatch(inverter.Objective(*parts), starts, labels, generator)
