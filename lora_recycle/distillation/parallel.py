"""One step on many processes: each forwards its share of the step's images, all see all features.

The images of a step are the same whatever the number of processes. A process forwards a part of them, the features
of the others come to it without gradient, and it computes the whole loss, in which only its own features carry
gradient. The sum of the processes' gradients is then the gradient of one process that forwards all images, also for
losses that compare images with each other, which no split of the loss itself would give.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

import torch
from accelerate import Accelerator
from torch import nn

from ..backbones.backbone import Backbone
from ..runtime.heartbeat import waiting
from .student import Student


Flag = TypeVar("Flag", bool, torch.Tensor)


def own_rows(count: int, process: int, num_processes: int) -> torch.Tensor:
    """Which of `count` images a process forwards: int64, as many in each process.

    The last image is repeated where they do not divide; `gather_features` drops the copies.
    """
    size = -(-count // num_processes)
    return (torch.arange(size) + process * size).clamp(max=count - 1)


def gather_features(own: torch.Tensor, count: int, accelerator: Accelerator) -> torch.Tensor:
    """Features (count, D) of all images from this process's (size, D); only its own carry gradient."""
    if accelerator.num_processes == 1:
        return own
    everyone = accelerator.gather(own.detach())
    start = accelerator.process_index * len(own)
    return torch.cat([everyone[:start], own, everyone[start + len(own) :]])[:count]


class ParallelStudent:
    """The student as the processes of a launch train it: one process has it as it is, several a copy each (DDP).

    Attributes:
        model: what forwards images.
        optimizer: Adam over the parameters that learn.
        loss_scale: factor on the loss, so that gradients are summed over the processes.
    """

    def __init__(self, student: Student, accelerator: Accelerator, lr: float):
        self.student, self.accelerator = student, accelerator
        self.model = accelerator.prepare(student.to(accelerator.device))
        self.loss_scale = float(accelerator.num_processes)  # DDP takes the mean
        self.optimizer = torch.optim.Adam(student.trainable(), lr=lr, fused=True)

    def embed(
        self, inputs: torch.Tensor, kept: torch.Tensor | None, count: int, other: Backbone | None = None
    ) -> torch.Tensor:
        """Features (count, D), float32, of the images of which this process forwards its share.

        Args:
            inputs: this process's share, as `Batch` has it: pixels, patches or tokens.
            kept: patch numbers of `inputs`, or None.
            count: images of all processes together.
            other: a network to ask in the student's place.
        """
        backbone, forward = (self.student.backbone, self.model) if other is None else (other, other.features)
        inputs, kept = inputs.to(backbone.device), None if kept is None else kept.to(backbone.device)
        inputs = backbone.normalize(inputs) if inputs.dtype == torch.uint8 else inputs.to(backbone.dtype)
        with self.accelerator.autocast():
            features = forward(inputs, kept).float()
        waiting()
        return gather_features(features, count, self.accelerator)

    def step(self, skip: torch.Tensor) -> None:
        """Move the parameters, or not where `skip` (bool, a scalar on the device) says so, without waiting for it."""
        # the hook that torch's gradient scaler has in fused optimisers
        self.optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
        self.optimizer.step()

    def gradient_norm(self, limit: float = 0.0) -> torch.Tensor:
        """Norm of all gradients, a scalar. Where it is above a `limit` other than 0 they are scaled down to it."""
        parameters = [p for p in self.student.trainable() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if limit:
            nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        return norm


def on_any(accelerator: Accelerator, flag: Flag) -> Flag:
    """Whether a flag is set in any process: all must do the same."""
    if accelerator.num_processes == 1:
        return flag
    total = accelerator.reduce(torch.as_tensor(flag, dtype=torch.float32, device=accelerator.device), "sum") > 0
    return total if isinstance(flag, torch.Tensor) else bool(total)


class OptimizerState(Protocol):
    """What is read and set of an optimiser."""

    state: Any  # torch's and a plain dictionary differ in how they are typed
    param_groups: list[dict[str, Any]]
