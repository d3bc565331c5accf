"""Launches of one run on two machines: what they make together, and what is told where they do not fit together."""

import dataclasses
import json
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers_launch import EXACT, INVERT, LAUNCHED, distill, environment, furthest
from helpers_machines import free_port, run, two_machines
from safetensors.torch import load_file

from lora_recycle.cli.main import main
from lora_recycle.pool.pool import AdapterPool
from lora_recycle.runtime.run_lock import only_run_in


pytestmark = pytest.mark.slow

VERB = ["-m", "lora_recycle"]


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    with two_machines(tmp_path_factory.mktemp("machines")) as found:
        yield found


def launch_both(machines, commands):
    """Each machine runs all of these commands in one process."""
    port, scenario = free_port(), json.dumps({"commands": [[str(word) for word in words] for words in commands]})
    return run(*(machine.launch(port, LAUNCHED, scenario) for machine in machines))


def share(machines, folder):
    """The shared folder as each machine has it: a link in its own working folder."""
    folder.mkdir()
    for machine in machines:
        (machine.folder / folder.name).symlink_to(folder)
    return folder


def test_two_machines_make_what_one_process_makes(machines, plain_pool_path, inverted, tmp_path, monkeypatch):
    shared = share(machines, tmp_path / "shared")
    invert = ["invert", plain_pool_path, "--output", "shared/surrogate", *INVERT]
    learn = distill(plain_pool_path, "shared/surrogate", "shared/meta")
    first, second = launch_both(machines, [invert, ["float64"], learn])
    assert first[0] == second[0] == 0, first[2] + second[2]
    for entry in [*inverted.manifest["shards"], {"file": "manifest.json"}]:
        made, expected = (folder / entry["file"] for folder in (shared / "surrogate", inverted.folder))
        assert made.read_bytes() == expected.read_bytes()
    assert first[1].count("adapter-0 ") == 1 and "relational " in first[1]
    assert second[1] == ""  # the main process alone reports
    assert first[2].count("Next: ") == 2 and "Next: " not in second[2]
    monkeypatch.setattr(AdapterPool, "from_pretrained", partial(AdapterPool.from_pretrained, dtype=torch.float64))
    assert main(distill(plain_pool_path, inverted.folder, tmp_path / "one")) == 0
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "one", shared / "meta"))
    assert furthest(one, two) < EXACT and max(value.abs().max() for value in one.values()) > 0.1
    for machine in machines:
        assert {path.name for path in machine.folder.iterdir()} == {"shared"}  # nothing lies anywhere else
    assert not list(shared.rglob(".launch"))


@pytest.fixture(scope="module")
def refused(tmp_path_factory, plain_pool_path):
    """Launches on two machines that are refused, with forked processes: name to what both said, and the folder."""
    work, scenarios = tmp_path_factory.mktemp("refused"), {}
    command = ["invert", str(plain_pool_path), *INVERT, "--output"]
    outputs = {"unshared": "out", "other": str(work / "other"), "held": str(work / "held")}
    for name, output in outputs.items():
        machines = [{"folder": str(work / f"{name}-{rank}"), "commands": [[*command, output]]} for rank in (0, 1)]
        for machine in machines:
            Path(machine["folder"]).mkdir()
        if name == "other":
            machines[1]["commands"][0] += ["--iterations", "4"]
        scenarios[name] = {"processes": 2, "machines": machines, "environment": {"LORA_RECYCLE_TIMEOUT": "20"}}
        scenarios[name]["log"] = str(work / f"{name}.log")
    with only_run_in(work / "held"):
        told = [sys.executable, str(LAUNCHED), "--fork", json.dumps(list(scenarios.values()))]
        ran = subprocess.run(told, capture_output=True, text=True, timeout=300, env=environment())
    assert json.loads(ran.stdout) == [1, 1, 1], ran.stderr
    return {name: Path(scenario["log"]).read_text() for name, scenario in scenarios.items()}, work


def test_a_folder_that_the_machines_do_not_share_is_refused(refused):
    said, work = refused[0]["unshared"], refused[1]
    for rank in (0, 1):
        assert (
            f"process {rank}: error: process 1 on {socket.gethostname()} does not see in {work / 'unshared-1'}" in said
        )
    assert said.count(f" in {work / 'unshared-0' / 'out'} wrote. All machines must write to one folder") == 2
    assert not (work / "unshared-1" / "out").exists() and not list((work / "unshared-0").rglob("*.safetensors"))


def test_machines_that_do_not_do_the_same_are_refused(refused):
    said, work = refused[0]["other"], refused[1]
    for rank in (0, 1):
        assert f"process {rank}: error: process 0 on " in said
    assert said.count("of this launch do not do the same: they differ in settings (iterations: 5 there, 4 here)") == 2
    assert said.count("Start the same command on all machines") == 2 and not (work / "other").exists()


def test_what_stops_one_machine_is_told_on_the_other(refused):
    said = refused[0]["held"]
    assert "process 0: error: " in said and "is at work here. Wait for it" in said
    assert "process 1: error: begin: process 1 lost the others: one of them failed, and says so itself" in said


@pytest.mark.parametrize("ranks", [[0], [0, 0], [1]])
def test_a_machine_that_does_not_come_ends_the_launch(machines, ranks, tmp_path):
    port, launches = free_port(), []
    for machine, rank in zip(machines, ranks, strict=False):
        asked = dataclasses.replace(machine, rank=rank)
        launches.append(
            asked.launch(port, "--rdzv_conf", "timeout=5", *VERB, "invert", "nothing", "--output", tmp_path)
        )
    for code, _, err in run(*launches, timeout=120):
        assert code not in (0, None) and ("imeout" in err or "imed out" in err or "port" in err)
