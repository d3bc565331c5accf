"""What `test_launch.py` starts. Under `accelerate launch`: one process of a launch. With `--fork`: several launches
one after the other, whose processes are forked from one that has imported torch, which takes most of the time.

    launched.py JSON            {"commands": [[...], ...]}, run one after the other while they succeed: of our command
                                line, or of `DIRECTIONS` here
    launched.py --fork JSON     a list of these, each with "processes", "environment" and "log" (a file); with
                                "machines" (each a "folder" and "commands") every process is a machine of its own
"""

import functools
import json
import os
import signal
import socket
import sys
import time

import torch

import lora_recycle.distillation.saving  # noqa: F401
from lora_recycle.cli.main import main
from lora_recycle.distillation.selection import CheckpointSelection
from lora_recycle.distillation.trainer import MetaLoRATrainer
from lora_recycle.errors import DataError
from lora_recycle.pool.pool import AdapterPool
from lora_recycle.runtime.launch import claim_indices, process_state


def run(scenario) -> int:
    torch.set_num_threads(1)
    for command in scenario["commands"]:
        verb, *words = command
        if code := DIRECTIONS[verb](*words) if verb in DIRECTIONS else main(command):
            return code
    return 0


def plant_fault(kind: str, process: str) -> None:
    """Make one process fail or fall silent in the third step from now on."""
    losses, steps = MetaLoRATrainer._losses, []

    def faulty(trainer, batch):
        steps.append(batch)
        if len(steps) == 3 and trainer.accelerator.process_index == int(process):
            if kind == "raise":
                raise DataError("planted: the disk of this process is gone")
            time.sleep(600)
        return losses(trainer, batch)

    MetaLoRATrainer._losses = faulty


def script_errors(best: str) -> None:
    """The students of this step err least, whatever their weights: which truly do differs between processors."""
    add = CheckpointSelection.add

    def scripted(self, step, candidate, errors, parameters):
        add(self, step, candidate, torch.full_like(errors, 30.0 + abs(step - int(best))), parameters)

    CheckpointSelection.add = scripted


def deal_out(count: str) -> int:
    """Process 0 is slow; each writes which numbers it got."""
    rank, mine = process_state().process_index, []
    for number in claim_indices(int(count)):
        mine.append(number)
        time.sleep(0.5 if rank == 0 else 0.01)
    print(json.dumps({"rank": rank, "numbers": mine}), flush=True)
    return 0


def read_in_float64() -> None:
    """Pools are read so from now on. In float32 it shows by how many processes a gradient was summed: where the sum
    cancels, its sign hangs on the order, and Adam steps by the sign."""
    AdapterPool.from_pretrained = functools.partial(AdapterPool.from_pretrained, dtype=torch.float64)


DIRECTIONS = {"fault": plant_fault, "best": script_errors, "deal": deal_out, "float64": read_in_float64}


def fork(scenario) -> int:
    """The processes of one launch, all ended when one fails, as `accelerate launch` does on one machine.

    Returns the exit code of the first that failed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children, code = set(), 0
    for rank in range(scenario["processes"]):
        if (child := os.fork()) == 0:
            _become(rank, port, scenario)
        children.add(child)
    while children:
        child, status = os.wait()
        children.discard(child)
        if status and not code:
            code = os.waitstatus_to_exitcode(status)
            time.sleep(1)  # the others may say what they saw
            for other in () if scenario.get("machines") else children:
                os.kill(other, signal.SIGKILL)
    return code


def _become(rank: int, port: int, scenario) -> None:
    log = os.open(scenario["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    size = scenario["processes"]
    if size > 1:
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        os.environ |= {name: str(value) for name, value in world.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= scenario.get("environment", {})
    if machines := scenario.get("machines"):
        os.chdir(machines[rank]["folder"])
        scenario |= {"commands": machines[rank]["commands"]}
    code = 70
    try:
        code = run(scenario)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    if sys.argv[1] == "--fork":
        print(json.dumps([fork(scenario) for scenario in json.loads(sys.argv[2])]))
    else:
        sys.exit(run(json.loads(sys.argv[1])))
