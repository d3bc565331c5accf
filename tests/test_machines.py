"""Launches of one run on two machines: what they make together, and what is told where they do not fit together."""

import dataclasses

import pytest
from helpers_machines import free_port, run, two_machines
from safetensors.torch import load_file
from test_processes import INVERT, distill, furthest

from lora_recycle.commands.main import main
from lora_recycle.locks import only_run_in


pytestmark = pytest.mark.slow

VERB = ["-m", "lora_recycle"]


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    with two_machines(tmp_path_factory.mktemp("machines")) as found:
        yield found


def launch_both(machines, *commands, **changes):
    port = free_port()
    both = [commands[0], commands[-1]]
    return run(*(m.launch(port, *VERB, *command, **changes) for m, command in zip(machines, both, strict=True)))


def share(machines, folder):
    """The shared folder as each machine has it: a link in its own working folder."""
    folder.mkdir()
    for machine in machines:
        (machine.folder / folder.name).symlink_to(folder)
    return folder


def test_two_machines_make_what_one_process_makes(machines, tiny_pool_path, tiny_surrogate, tmp_path):
    shared = share(machines, tmp_path / "shared")
    first, second = launch_both(machines, ["invert", tiny_pool_path, "--output", "shared/surrogate", *INVERT])
    assert first[0] == second[0] == 0, first[2] + second[2]
    for entry in [*tiny_surrogate.manifest["shards"], {"file": "manifest.json"}]:
        assert (shared / "surrogate" / entry["file"]).read_bytes() == (
            tiny_surrogate.folder / entry["file"]
        ).read_bytes()
    assert first[1].count("adapter-0 ") == 1 and second[1] == ""  # the main process alone reports
    assert "Next: " in first[2] and "Next: " not in second[2]
    first, second = launch_both(machines, distill(tiny_pool_path, "shared/surrogate", "shared/meta"))
    assert first[0] == second[0] == 0, first[2] + second[2]
    assert "relational " in first[1] and second[1] == ""
    assert main(distill(tiny_pool_path, tiny_surrogate.folder, tmp_path / "one")) == 0
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "one", shared / "meta"))
    assert furthest(one, two) < 5e-6 and max(value.abs().max() for value in one.values()) > 0.1
    for machine in machines:
        assert {path.name for path in machine.folder.iterdir()} == {"shared"}  # nothing lies anywhere else
    assert not list(shared.rglob(".launch"))


def test_a_folder_that_the_machines_do_not_share_is_refused(machines, tiny_pool_path):
    command = ["invert", tiny_pool_path, "--output", "own", *INVERT]
    ended = launch_both(machines, command, LORA_RECYCLE_TIMEOUT="20")
    for code, out, err in ended:
        assert code != 0 and out == ""
        here, there = (machine.folder / "own" for machine in reversed(machines))
        assert "error: process 1 on " in err and f"does not see in {here} what process 0 on " in err
        assert f" in {there} wrote. All machines must write to one folder" in err
    assert not (machines[1].folder / "own").exists() and not list((machines[0].folder / "own").rglob("*.safetensors"))


def test_machines_that_do_not_do_the_same_are_refused(machines, tiny_pool_path, tmp_path):
    command = ["invert", tiny_pool_path, "--output", tmp_path / "out", *INVERT]
    for code, out, err in launch_both(machines, command, [*command, "--iterations", "4"]):
        assert code != 0 and out == ""
        assert "of this launch do not do the same: they differ in settings" in err
        assert "Start the same command on all machines" in err
    assert not (tmp_path / "out").exists()


def test_what_stops_one_machine_is_told_on_the_other(machines, tiny_pool_path, tmp_path):
    command = ["invert", tiny_pool_path, "--output", tmp_path, *INVERT]
    with only_run_in(tmp_path):
        first, second = launch_both(machines, command, LORA_RECYCLE_TIMEOUT="60")
    assert first[0] != 0 and "process 0: error: " in first[2] and "is at work here" in first[2]
    assert second[0] != 0 and "process 1: error: begin: process 1 lost the others: one of them failed" in second[2]


def test_machines_that_do_not_reach_each_other_are_told_what_to_set(machines, tmp_path):
    if not machines[0].within:
        pytest.skip("only root may make networks")
    command = ["invert", "nothing", "--output", tmp_path]
    ended = launch_both(machines, command, LORA_RECYCLE_TIMEOUT="10", GLOO_SOCKET_IFNAME="lo")
    assert all(code != 0 for code, _, _ in ended)
    told = [err for _, _, err in ended if "does not reach the others" in err]
    assert told and all("set GLOO_SOCKET_IFNAME" in err and "bug: " not in err for err in told)


@pytest.mark.parametrize("ranks", [[0], [0, 0], [1]])
def test_a_machine_that_does_not_come_ends_the_launch(machines, ranks, tmp_path):
    port, launches = free_port(), []
    for machine, rank in zip(machines, ranks, strict=False):
        asked = dataclasses.replace(machine, rank=rank)
        launches.append(asked.launch(port, "--rdzv_conf", "timeout=5", *VERB, "invert", "nothing", "--output", tmp_path))
    for code, _, err in run(*launches, timeout=120):
        assert code not in (0, None) and ("imeout" in err or "imed out" in err or "port" in err)
