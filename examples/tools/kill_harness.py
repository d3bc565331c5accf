"""Kill `lora-recycle invert` and `distill` at random moments, resume, and compare with a run that nobody disturbed.

    python examples/tools/kill_harness.py --kills 50
    python examples/tools/kill_harness.py --kills 6 --signals KILL TERM INT --seed 1
    python examples/tools/kill_harness.py --quick                           4 kills of a smaller run

Each kill hits a live process that is at work: at a moment drawn at random after it took the lock of its output folder,
or when it next writes a file. The command is then started again with `--resume`, and killed again, until it comes to
its end; another such run follows, until there were enough kills. At the end all files of the surrogate data and of the
meta-LoRA must be those of the undisturbed run, byte for byte. Exits with 1 where one is not.

Each command is a process of its own, forked from this one: to import torch takes longer than the run.

The last line is `N kills, M resumes, D differences`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO

import lora_recycle.distillation.saving
import lora_recycle.inversion.inverter  # noqa: F401 - both stages, imported before anything is forked
from lora_recycle.cli.main import main as run_command
from lora_recycle.hub.embedded import pool_path
from lora_recycle.runtime.run_lock import OWNER_FILE


#: How a process ends that a signal hit: by the system, or by the command line's own exit code.
EXIT_CODES = {"KILL": -signal.SIGKILL, "TERM": 143, "INT": 130}
FORK = multiprocessing.get_context("fork")


@dataclasses.dataclass
class Stage:
    """One command of the run, and the folder that it writes to."""

    name: str
    arguments: list[str]

    def command(self, folder: Path, resume: bool) -> list[str]:
        """What follows `lora-recycle`."""
        arguments = [argument.replace("{}", str(folder)) for argument in self.arguments]
        return [self.name, *arguments, "--quiet"] + ["--resume"] * resume

    def output(self, folder: Path) -> Path:
        return folder / ("surrogate" if self.name == "invert" else "meta_lora")


def stages(adapters: int, iterations: int, steps: int) -> list[Stage]:
    """A small run on some of the shipped adapters."""
    found = sorted(path for path in pool_path().iterdir() if path.is_dir())
    pool = [str(path) for path in found[:: len(found) // adapters][:adapters]]
    invert = ["--output", "{}/surrogate", "--images-per-class", "3", "--max-classes", "5"]
    distill = ["--surrogate", "{}/surrogate", "--output", "{}/meta_lora", "--rank", "4", "--relational-batch", "16"]
    distill += ["--kl-weight", "1", "--episodes", "1", "--queries", "1", "--save-steps", "5"]
    distill += ["--groups", "one", "--eval-steps", "4", "--init", "zero"]
    return [
        Stage("invert", [*pool, *invert, "--iterations", str(iterations)]),
        Stage("distill", [*pool, *distill, "--steps", str(steps)]),
    ]


@dataclasses.dataclass
class Kill:
    """After `delay` seconds of work, or from then on as soon as a file is being written."""

    signal: str
    delay: float
    while_writing: bool


def at_work(output: Path, process: BaseProcess) -> bool:
    """Whether the process holds the lock of its folder (that of `distill` is that of its checkpoints)."""
    for path in (output / OWNER_FILE, output / "work" / OWNER_FILE):
        try:
            if json.loads(path.read_text())["pid"] == process.pid:
                return True
        except (OSError, ValueError):
            pass
    return False


def attempt(stage: Stage, folder: Path, resume: bool, kill: Kill | None) -> tuple[bool, float]:
    """Run a stage, to its end or to the kill: whether it was killed, and its seconds of work until then.

    Raises:
        SystemExit: it failed.
    """
    output = stage.output(folder)
    with tempfile.TemporaryFile("w+", buffering=1) as told:
        process = FORK.Process(target=_become, args=(stage.command(folder, resume), told))
        process.start()
        while process.is_alive() and not at_work(output, process):
            time.sleep(0.002)
        started = time.monotonic()
        if kill is not None:
            _wait_for_moment(process, output, kill)
            if process.is_alive():
                os.kill(process.pid, getattr(signal, f"SIG{kill.signal}"))
        process.join()
        code, seconds = process.exitcode, time.monotonic() - started
        told.seek(0)
        words = told.read()
    # the second code: the process was done, and no longer minded the signal
    killed = kill is not None and code in (EXIT_CODES[kill.signal], -getattr(signal, f"SIG{kill.signal}"))
    if code != 0 and not killed or "Traceback" in words:
        raise SystemExit(f"{stage.name} ended with {code}:\n{words[-3000:]}")
    return killed, seconds


def _become(command: list[str], told: IO[str]) -> None:
    """Turn a forked process into one of `lora-recycle`, whose errors go to `told`."""
    os.dup2(told.fileno(), 2)
    with open(os.devnull, "w") as nowhere:
        sys.stdout, sys.stderr = nowhere, told
        sys.exit(run_command(command))


def _wait_for_moment(process: BaseProcess, output: Path, kill: Kill) -> None:
    end = time.monotonic() + kill.delay
    while process.is_alive() and time.monotonic() < end:
        time.sleep(0.001)
    while kill.while_writing and process.is_alive() and not any(output.rglob(".*.partial")):
        time.sleep(0.0005)


def content(folder: Path) -> dict[str, bytes]:
    """What a run is for: shards, manifest, meta-LoRA; not checkpoints, locks and pages, which name their folder."""
    paths = [path for path in folder.rglob("*") if path.is_file() and "work" not in path.parts]
    kept = [path for path in paths if not path.name.startswith(".") and path.suffix != ".html"]
    names = {path.relative_to(folder).as_posix(): path for path in kept}
    return {name: path.read_bytes() for name, path in names.items()}


def differences(one: dict[str, bytes], other: dict[str, bytes]) -> list[str]:
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


class Harness:
    """Counts kills and resumes over disturbed runs."""

    def __init__(self, todo: list[Stage], kills: int, signals: list[str], seed: int):
        self.todo, self.signals, self.draw = todo, signals, random.Random(seed)
        self.left = {"invert": kills - kills // 2, "distill": kills // 2}
        self.kills = self.resumes = 0

    def undisturbed(self, folder: Path) -> dict[str, float]:
        """Run all stages; their seconds of work."""
        return {stage.name: attempt(stage, folder, False, None)[1] for stage in self.todo}

    def disturbed(self, folder: Path, seconds: dict[str, float]) -> None:
        """Run all stages, each killed and resumed until it ends or no kill is left for it."""
        for stage in self.todo:
            killed, resume = True, False
            while killed:
                killed, worked = attempt(stage, folder, resume, self._next_kill(stage, seconds[stage.name]))
                self.resumes += resume
                resume = resume or killed
                if killed:
                    self.kills += 1
                    self.left[stage.name] -= 1
                    print(f"kill {self.kills}: {stage.name} after {worked:.2f} s of work", flush=True)

    def _next_kill(self, stage: Stage, seconds: float) -> Kill | None:
        if not self.left[stage.name]:
            return None
        return Kill(self.draw.choice(self.signals), self.draw.uniform(0, seconds / 2), self.draw.random() < 0.3)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, help="default: 50; with --quick 4")
    parser.add_argument("--signals", nargs="+", choices=tuple(EXIT_CODES), default=["KILL"], help="default: KILL")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a smaller run")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it, and its children would
    kills = args.kills if args.kills is not None else 4 if args.quick else 50
    todo = stages(adapters=4, iterations=6, steps=20) if args.quick else stages(adapters=6, iterations=40, steps=60)
    harness, found = Harness(todo, kills, args.signals, args.seed), 0
    with tempfile.TemporaryDirectory(prefix="kill-harness-") as folder:
        seconds = harness.undisturbed(Path(folder) / "0")
        told = ", ".join(f"{name} {number:.1f} s" for name, number in seconds.items())
        print(f"undisturbed: {told} of work", flush=True)
        expected, run = content(Path(folder) / "0"), 0
        while harness.kills < kills:
            run += 1
            harness.disturbed(Path(folder) / str(run), seconds)
            differing = differences(expected, content(Path(folder) / str(run)))
            found += len(differing)
            told = f"differences: {', '.join(differing)}" if differing else f"{len(expected)} files byte-identical"
            print(f"run {run}: {told}", flush=True)
    print(f"{harness.kills} kills, {harness.resumes} resumes, {found} differences")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
