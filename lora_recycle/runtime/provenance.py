"""What a result depends on beside its recipe and data: versions of the packages, and the machine."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path
from typing import Any

import torch

from ..version import __version__


#: Packages whose code computes, reads or writes what goes into a meta-LoRA.
PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "huggingface_hub",
    "datasets",
    "numpy",
    "scipy",
    "pillow",
)


def versions() -> dict[str, str]:
    """Versions of this library, of Python and of `PACKAGES`."""
    packages = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "lora_recycle": __version__,
        "python": platform.python_version(),
        **packages,
        "torch": str(torch.__version__),
    }


def hardware(device: torch.device, num_processes: int = 1, mixed_precision: str = "no") -> dict[str, Any]:
    """What the order of sums may depend on: kind of machine, instructions, threads, processes and precision."""
    accelerated = device.type != "cpu"
    return {
        "device": device.type,
        "name": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "cuda": torch.version.cuda if accelerated else None,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "processes": num_processes,
        "mixed_precision": mixed_precision,
    }


def _processor() -> str:
    """The CPU's model; Linux tells it in a file alone."""
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text(encoding="utf-8", errors="replace").splitlines() if cpu_info.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
