"""The processes that `accelerate launch` started."""

from __future__ import annotations

import os

from accelerate import Accelerator, PartialState
from accelerate.utils import parse_flag_from_env

from .errors import ConfigError


def process_state() -> PartialState:
    """Number and rank of this process. On CPU, accelerate only sees the others when it is told that it is on CPU.

    Raises:
        ConfigError: more processes were launched than accelerate sees: each would do all the work.
    """
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world != state.num_processes:
        raise ConfigError(
            f"{world} processes were launched, but accelerate sees {state.num_processes}. On CPU: "
            "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N ..."
        )
    return state


def mixed_precision() -> Accelerator:
    """What `accelerate launch --mixed_precision` chose, for `.autocast()` around forwards: `no` or `bf16`.

    Raises:
        ConfigError: fp16 was chosen, which needs losses to be scaled.
    """
    process_state()
    accelerator = Accelerator()
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ConfigError(f"mixed_precision must be no or bf16, got {accelerator.mixed_precision}")
    return accelerator
