"""Two machines, as far as one can show them: each a network, a working folder and a launch of its own."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Machine:
    """`folder` is where its commands run; `within` comes before each of them."""

    rank: int
    folder: Path
    main_ip: str = "127.0.0.1"
    within: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)

    def launch(self, port, *arguments, **changes) -> subprocess.Popen:
        """One process of a launch of two by `accelerate launch`."""
        command = [*self.within, sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu"]
        command += ["--num_machines", "2", "--num_processes", "2", "--machine_rank", self.rank]
        command += ["--main_process_ip", self.main_ip, "--main_process_port", port, "--rdzv_conf", "timeout=60"]
        command += ["--mixed_precision", "no", "--dynamo_backend", "no", *arguments]
        packages = str(Path(__file__).parents[2])
        own = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": packages}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        environment = os.environ | own | self.environment | changes
        return subprocess.Popen([str(word) for word in command], cwd=self.folder, env=environment, **pipes)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run(*launches: subprocess.Popen, timeout: float = 300) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of launches that belong together; whoever hangs is ended, and fails the test."""
    try:
        said = [launch.communicate(timeout=timeout) for launch in launches]
    finally:
        for launch in launches:
            launch.kill()
    return [(launch.returncode, *told) for launch, told in zip(launches, said, strict=True)]


@contextlib.contextmanager
def two_machines(folder: Path):
    """In networks of their own, joined by a cable, where the system lets us; else both on this one."""
    homes = [folder / "machine-0", folder / "machine-1"]
    for home in homes:
        home.mkdir(parents=True)
    names = [f"lr{os.getpid()}m{rank}" for rank in (0, 1)]
    cables = [f"lr{os.getpid()}c{rank}"[-15:] for rank in (0, 1)]
    try:
        if not _joined(names, cables):
            yield [Machine(rank, home) for rank, home in enumerate(homes)]
            return
        yield [
            Machine(rank, home, "10.77.0.1", ["ip", "netns", "exec", name], {"GLOO_SOCKET_IFNAME": cable})
            for rank, (home, name, cable) in enumerate(zip(homes, names, cables, strict=True))
        ]
    finally:
        for name in names if shutil.which("ip") else ():
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def _joined(names: list[str], cables: list[str]) -> bool:
    """Make two networks of these names, 10.77.0.1 and 10.77.0.2; False where the system does not let us."""
    if os.name != "posix" or os.geteuid() != 0 or not shutil.which("ip"):
        return False
    commands = [f"ip netns add {name}" for name in names]
    commands.append(f"ip link add {cables[0]} netns {names[0]} type veth peer name {cables[1]} netns {names[1]}")
    for rank, (name, cable) in enumerate(zip(names, cables, strict=True)):
        commands.append(f"ip -n {name} addr add 10.77.0.{rank + 1}/24 dev {cable}")
        commands += [f"ip -n {name} link set {device} up" for device in (cable, "lo")]
    return all(subprocess.run(command.split(), capture_output=True).returncode == 0 for command in commands)
