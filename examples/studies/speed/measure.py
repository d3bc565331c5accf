"""What a step costs: seconds beside its baselines, FLOPs, memory, and the operations that it spends its time in."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from lora_recycle.evaluation.memory import peak_bytes


@dataclasses.dataclass
class Case:
    """One thing to time.

    Args:
        name: of its row and its ratios.
        step: does the whole of it once.
        images: how many images that handles.
        keep_ratio: share of the patch tokens that are forwarded, mean over layers.
        host_share: share of its time in which the model waits for the host, where the library knows it.
    """

    name: str
    step: Callable[[], Any]
    images: int
    keep_ratio: float | None = None
    host_share: Callable[[], float] | None = None


def _cpu_attention(query, key, value, *args, out_shape=None, **kwargs) -> int:
    return sdpa_flop_count(query, key, value)


def _cpu_attention_backward(grad_out, query, key, value, *args, out_shape=None, **kwargs) -> int:
    return sdpa_backward_flop_count(grad_out, query, key, value)


#: torch counts the attention of GPUs only.
_CPU_FLOPS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward,
}


def cost(step: Callable[[], Any], device: torch.device) -> tuple[int, int]:
    """FLOPs of one step (a multiplication and an addition are two), and the bytes that it holds at most beside what
    was there before: from the allocator on CUDA, elsewhere by following every tensor."""
    with FlopCounterMode(display=False, custom_mapping=_CPU_FLOPS) as flops:
        peak = peak_bytes(step, device)
    return flops.get_total_flops(), peak


#: how often cases change places within a round, as far as they are repeated so often
TURNS = 10


def interleaved(cases: Sequence[Case], rounds: int, device: torch.device, least: float) -> dict[str, list[float]]:
    """Seconds of one step of each case in each round. Every round repeats each case until `least` seconds are over,
    in short turns, forwards and backwards through the cases: a machine's speed wavers within a second, and steps of a
    few milliseconds that were timed one second apart scattered by a tenth."""
    repeats = {case.name: max(1, round(least / timed(case.step, 1, device))) for case in cases}  # a warm-up too
    turns = {name: min(TURNS, number) for name, number in repeats.items()}
    seconds: dict[str, list[float]] = {case.name: [0.0] * rounds for case in cases}
    for number in range(rounds):
        for turn in range(max(turns.values())):
            for case in cases if (number + turn) % 2 == 0 else reversed(cases):
                if turn < turns[case.name]:
                    if repeats[case.name] > 1:
                        case.step()  # after the large product the clock is slower, and the caches are another's
                    each = timed(case.step, repeats[case.name] // turns[case.name], device)
                    seconds[case.name][number] += each / turns[case.name]
    return seconds


def timed(step: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Seconds of one of `repeats` steps."""
    _wait(device)
    started = time.perf_counter()
    for _ in range(repeats):
        step()
    _wait(device)
    return (time.perf_counter() - started) / repeats


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def paired_ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """How many times faster: the median over rounds of the quotient within a round."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def matmul_case(device: torch.device, dtype: torch.dtype) -> Case:
    """A large matrix product: what this machine reaches at best."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    return Case("matmul", lambda: a @ b, images=1)


def top_operations(step: Callable[[], Any], repeats: int, device: torch.device, count: int = 6) -> dict[str, float]:
    """The operations that a step spends most of its time in, and their shares of it."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with profile(activities=activities) as profiled:
        for _ in range(repeats):
            step()
        _wait(device)
    times = {
        event.key: event.self_device_time_total if cuda else event.self_cpu_time_total
        for event in profiled.key_averages()
    }
    total = sum(times.values())
    largest = sorted(times, key=times.get, reverse=True)[:count]
    return {name.removeprefix("aten::"): round(times[name] / total, 3) for name in largest}


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on, and with."""
    import peft
    import transformers

    import lora_recycle

    modules = {"torch": torch, "transformers": transformers, "peft": peft, "lora_recycle": lora_recycle}
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        **{name: str(module.__version__) for name, module in modules.items()},
    }


def _processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
