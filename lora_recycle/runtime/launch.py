"""The processes that `accelerate launch` started: how many they are, and how they share work."""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed
from accelerate import Accelerator, PartialState
from accelerate.utils import parse_flag_from_env

from ..errors import ConfigError, ProcessError, first_line


#: Environment variable: seconds that processes wait for each other before the run stops with an error.
TIMEOUT_VARIABLE = "LORA_RECYCLE_TIMEOUT"
_DEFAULT_TIMEOUT = 1800.0
#: Where launchers other than torch's say how many processes they started.
_OTHER_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_RIGHT_COMMAND = (
    "Start it with `accelerate launch --num_processes N -m lora_recycle ...`; on CPU with "
    "`ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N -m lora_recycle ...`"
)
_INTERFACE = (
    "Where the name of a machine does not lead to that, set GLOO_SOCKET_IFNAME (on GPUs NCCL_SOCKET_IFNAME) to its "
    "network interface, such as eth0."
)

_calls = itertools.count()


def process_state() -> PartialState:
    """Number and rank of this process. On CPU, accelerate sees the others only where it knows that it is on CPU.

    Raises:
        ConfigError: more processes were asked for or started than accelerate sees: each would do all the work, or
            one would do it alone. Or this machine's name leads nowhere for the others.
        ProcessError: the others cannot be reached.
    """
    timeout, cpu = timedelta(seconds=collective_timeout()), parse_flag_from_env("ACCELERATE_USE_CPU")
    if cpu:
        _check_name()
    try:
        state = PartialState(cpu=cpu, timeout=timeout)
    except RuntimeError as error:
        if not lost_the_others(error):
            raise
        raise ProcessError(
            f"The process on {socket.gethostname()} does not reach the others ({first_line(error)}). Each machine "
            "needs the same --num_processes, --main_process_ip and --main_process_port, a --machine_rank of its own, "
            f"and an address that the others reach. {_INTERFACE}"
        ) from error
    _check_launch(state.num_processes)
    return state


def choose_device(name: str | None = None) -> torch.device:
    """Where this process computes: the device of this name, or by default what accelerate chooses, a GPU if there is
    one. What runs through accelerate later computes there too, if this is asked first.

    Raises:
        ConfigError: this machine has no such device, or a launch is refused by `process_state`.
    """
    if name is None:
        return process_state().device
    try:
        wanted = torch.device(name)
        if os.environ.get("WORLD_SIZE", "1") == "1":
            os.environ["ACCELERATE_TORCH_DEVICE"] = str(wanted)
        process_state()  # gives each process of a launch its own GPU, which `cuda` then means
        return torch.empty(0, device=wanted).device
    except (RuntimeError, AssertionError) as error:
        os.environ.pop("ACCELERATE_TORCH_DEVICE", None)
        raise ConfigError(f"--device {name}: not available on this machine ({first_line(error)}).") from error


def lost_the_others(error: BaseException) -> bool:
    """Whether a collective failed: the backends tell of a peer that is gone and of a time that is up."""
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    )


def collective_timeout() -> float:
    """Seconds that processes wait for each other. Raises `ConfigError` where the environment gives no number."""
    text = os.environ.get(TIMEOUT_VARIABLE, "")
    try:
        seconds = float(text or _DEFAULT_TIMEOUT)
        if not 0 < seconds < float("inf"):
            raise ValueError
    except ValueError:
        raise ConfigError(f"{TIMEOUT_VARIABLE} must be a positive number of seconds, got {text!r}.") from None
    return seconds


def _check_name() -> None:
    """Gloo tells the other machines the address of this one's name; they would wait for it for hours."""
    world, here = os.environ.get("WORLD_SIZE"), os.environ.get("LOCAL_WORLD_SIZE")
    if here in (None, world) or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    name, main = socket.gethostname(), os.environ.get("MASTER_ADDR", "")
    if _leads_to_itself(name) and not _leads_to_itself(main):
        raise ConfigError(
            f"{name}, the name of this machine, leads to 127.*, where {main} does not find it. {_INTERFACE}"
        )


def _leads_to_itself(name: str) -> bool:
    try:
        return socket.gethostbyname(name).startswith("127.")
    except OSError:
        return False


def _check_launch(seen: int) -> None:
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        raise ConfigError("Each process holds the whole backbone, which FSDP would share out. Leave out --use_fsdp.")
    world = os.environ.get("WORLD_SIZE")
    if world is not None:
        if int(world) != seen:
            raise ConfigError(f"{world} processes were launched, but accelerate sees {seen}. {_RIGHT_COMMAND}.")
        return
    # `accelerate launch` leaves an address to meet at where several processes were asked for, even if it starts one
    if seen == 1 and {"MASTER_ADDR", "ACCELERATE_MIXED_PRECISION"} <= os.environ.keys():
        raise ConfigError(
            "`accelerate launch` was asked for several processes, but started one: so it does with `--cpu`, and "
            f"without `--multi_gpu` where it finds no GPU. {_RIGHT_COMMAND}, or with `--num_processes 1`."
        )
    for name in _OTHER_COUNTS:
        if seen == 1 and os.environ.get(name, "").isdigit() and int(os.environ[name]) > 1:
            raise ConfigError(
                f"{os.environ[name]} tasks were started ({name}), and each would do all the work. {_RIGHT_COMMAND}, "
                f"once on each machine. Where each task has an output folder of its own, unset {name}."
            )


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


def shared_store(name: str) -> torch.distributed.Store:
    """Keys and values that all processes of the launch see, apart from those of earlier calls.

    All processes must call this as often and in the same order.
    """
    # the store that the processes met at: torch has no public name for it, and a second one would need a second port
    default = torch.distributed.distributed_c10d._get_default_store()
    return torch.distributed.PrefixStore(f"lora_recycle/{name}/{next(_calls)}", default)


def claim_indices(count: int) -> Iterator[int]:
    """Numbers from 0 to `count` - 1, each to one process: to the one that asks first, so that a slow one holds nobody
    up. All processes must call this, in the same order."""
    if process_state().num_processes == 1:
        return iter(range(count))
    store = shared_store("deal")
    return itertools.takewhile(lambda number: number < count, (store.add("next", 1) - 1 for _ in itertools.count()))
