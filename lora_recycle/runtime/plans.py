"""What a long run would do and cost: a table of stages, with the time from steps that were measured here."""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch


#: What plans measure with. Processor time (`time.process_time`) compares plans with runs on a machine that others use.
clock: Callable[[], float] = time.perf_counter
#: Steps that are measured after one that warms up; their median counts.
MEASURED = 3


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Args:
        name: of the stage.
        work: what is done, in words.
        seconds: of each process.
        gflops: of all processes, from shapes; None where a stage is not made of forwards.
    """

    name: str
    work: str
    seconds: float
    gflops: float | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run would do.

    Attributes:
        stages: in their order.
        memory: bytes, the most that one process held while its steps were measured: the whole process on a CPU, what
            torch held on a GPU.
        disk: bytes that the run leaves or needs meanwhile in its output folder.
        processes: how many share the work.
        notes: what the numbers rest on.
    """

    stages: list[Stage]
    memory: int
    disk: int
    processes: int = 1
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def seconds(self) -> float:
        """From start to end."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def gflops(self) -> float:
        return sum(stage.gflops or 0.0 for stage in self.stages)

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Stage, work, GFLOPs and time of each stage, and the total, as text."""
        rows = [
            (s.name, s.work, "-" if s.gflops is None else f"{s.gflops:,.0f}", duration(s.seconds)) for s in self.stages
        ]
        return [*rows, ("total", "", f"{self.gflops:,.0f}", duration(self.seconds))]

    def summary(self) -> str:
        """Memory, disk and processes in one line."""
        many = f", each of {self.processes} processes" if self.processes > 1 else ""
        return f"memory {size(self.memory)}{many}; disk {size(self.disk)}"


def duration(seconds: float) -> str:
    """Seconds as a reader takes them in: `0.4 s`, `42 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def size(count: int) -> str:
    """Bytes as MB or GB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def seconds_of(step: Callable[[], Any], device: torch.device, warm_up: bool = True) -> float:
    """The median of `MEASURED` steps."""
    if warm_up:
        step()
    return statistics.median(seconds_once(step, device) for _ in range(MEASURED))


def seconds_once(step: Callable[[], Any], device: torch.device) -> float:
    """Of one step, until the device has done it."""
    _wait(device)
    started = clock()
    step()
    _wait(device)
    return clock() - started


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def peak_memory(device: torch.device) -> int:
    """Bytes that this process held at most so far: by torch on CUDA, else in all; 0 where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
