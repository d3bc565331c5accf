"""One step on many processes: each forwards its share of the step's images, all see all features.

The images of a step are the same whatever the number of processes. A process forwards a part of them, the features
of the others come to it without gradient, and it computes the whole loss, in which only its own features carry
gradient. The sum of the processes' gradients is then the gradient of one process that forwards all images, also for
losses that compare images with each other, which no split of the loss itself would give.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env
from torch import nn

from .student import Blend, Student


if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


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
    """The student as the processes of a launch train it: as it is, copied to each (DDP), or shared out (FSDP).

    FSDP is chosen by `accelerate launch --use_fsdp`. It is torch's `fully_shard`, layer by layer, which runs on CPU
    too; of accelerate's other FSDP settings none is read. `student` then stays as it is, and `update_student` brings
    it up to date.

    Attributes:
        model: what forwards images.
        optimizer: Adam over the parameters of `model` that learn.
        loss_scale: factor on the loss, so that gradients are summed over the processes.
    """

    def __init__(self, student: Student, accelerator: Accelerator, lr: float):
        self.student, self.accelerator, self.loss_scale = student, accelerator, 1.0
        self.sharded = parse_flag_from_env("ACCELERATE_USE_FSDP") and accelerator.num_processes > 1
        student.to(accelerator.device)
        if self.sharded:
            self.model = _fully_sharded(student, accelerator)
        else:
            self.model = accelerator.prepare(student)
            self.loss_scale = float(accelerator.num_processes)  # DDP takes the mean
        self.optimizer = torch.optim.Adam(self.trainable(), lr=lr, fused=True)

    def trainable(self) -> list[nn.Parameter]:
        """The parameters that the optimiser moves, in the order of `student.trainable()`."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def step(self, skip: torch.Tensor) -> None:
        """Move the parameters, or not where `skip` (bool, a scalar on the device) says so, without waiting for it."""
        # the hook that torch's gradient scaler has in fused optimisers
        self.optimizer.found_inf = self._spread(skip.float())  # type: ignore[attr-defined]
        self.optimizer.step()

    def gradient_norm(self, limit: float = 0.0) -> torch.Tensor:
        """Norm of all gradients, a scalar. Where it is above a `limit` other than 0 they are scaled down to it."""
        parameters = [p for p in self.trainable() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if limit:
            nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        return _whole(norm)

    def blended(self, blend: Blend) -> AbstractContextManager[None]:
        """As [`Student.blended`]."""
        return cast(Student, getattr(self.model, "module", self.model)).blended(blend)

    def reshard(self) -> None:
        """After forwards without a backward, whose end it is otherwise: parameters are shared out again."""
        if self.sharded:
            cast("FSDPModule", self.model).reshard()

    @torch.no_grad()
    def update_student(self) -> None:
        """Bring `student` up to date, in all processes at once."""
        if self.sharded:
            for own, shared in zip(self.student.trainable(), self.trainable(), strict=True):
                own.copy_(_whole(shared))

    @torch.no_grad()
    def whole_optimizer(self) -> OptimizerState:
        """The optimiser with whole states, keyed by the student's parameters, in all processes at once."""
        if not self.sharded:
            return self.optimizer
        states = {}
        for own, shared in zip(self.student.trainable(), self.trainable(), strict=True):
            states[own] = {name: _whole(value) for name, value in self.optimizer.state[shared].items()}
        return SimpleNamespace(state=states, param_groups=self.optimizer.param_groups)

    @torch.no_grad()
    def take(self, optimizer: OptimizerState) -> None:
        """Take over the student's parameters and the whole states of `whole_optimizer`, as set by a checkpoint."""
        if not self.sharded:
            return
        for own, shared in zip(self.student.trainable(), self.trainable(), strict=True):
            shared.copy_(self._shared(own.detach(), shared))
            state = optimizer.state[own]
            moments = {name: self._shared(state[name], shared) for name in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[shared] = {**moments, "step": state["step"]}

    def _shared(self, value: torch.Tensor, like: Any) -> torch.Tensor:
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value, like.device_mesh, like.placements)

    def _spread(self, value: torch.Tensor) -> torch.Tensor:
        """A scalar beside sharded parameters: one tensor of the same kind."""
        if not self.sharded:
            return value
        from torch.distributed.tensor import DTensor, Replicate

        mesh = self.trainable()[0].device_mesh  # type: ignore[attr-defined]  # a DTensor too
        return DTensor.from_local(value, mesh, [Replicate()], run_check=False)


def _fully_sharded(student: Student, accelerator: Accelerator) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    sharded = copy.deepcopy(student)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    # the last layer goes with the rest: the backbone runs its parts, which would not gather it
    for module in (*sharded.backbone.layers[:-1], sharded):
        fully_shard(module, mesh=mesh)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no mean
        module.set_gradient_divide_factor(1.0)
    return sharded


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that is shared out to the processes, in all of them; any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


class OptimizerState(Protocol):
    """What is read and set of an optimiser."""

    state: Any  # torch's and a plain dictionary differ in how they are typed
    param_groups: list[dict[str, Any]]
