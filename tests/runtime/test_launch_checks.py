"""Launches that would do the work several times are refused before they begin."""

import socket

import pytest
import torch

from lora_recycle.cli.main import main
from lora_recycle.errors import ConfigError, ProcessError
from lora_recycle.runtime import launch
from lora_recycle.runtime.launch import claim_indices, collective_timeout, process_state


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"WORLD_SIZE": "2"}, "2 processes were launched, but accelerate sees 1. Start it with `accelerate launch"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, r"4 tasks were started \(SLURM_STEP_NUM_TASKS\), and each would do all"),
        ({"OMPI_COMM_WORLD_SIZE": "3"}, "3 tasks were started"),
        ({"ACCELERATE_USE_FSDP": "true"}, "which FSDP would share out. Leave out --use_fsdp"),
        ({"LORA_RECYCLE_TIMEOUT": "soon"}, "LORA_RECYCLE_TIMEOUT must be a positive number of seconds, got 'soon'"),
    ],
)
def test_copies_of_one_process_are_refused(monkeypatch, variables, told):
    process_state()
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=told):
        process_state()


def test_a_machine_whose_name_leads_nowhere_is_told_what_to_set(monkeypatch):
    addresses = {"gpu08": "127.0.1.1", "gpu07": "10.0.0.1", "localhost": "127.0.0.1"}
    monkeypatch.setattr(socket, "gethostname", lambda: "gpu08")
    monkeypatch.setattr(socket, "gethostbyname", addresses.__getitem__)
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "gpu07"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        ConfigError, match=r"gpu08, .* leads to 127.\*, where gpu07 does not .* set GLOO_SOCKET_IFNAME"
    ):
        process_state()
    for name, value in {"MASTER_ADDR": "localhost", "GLOO_SOCKET_IFNAME": "eth0", "LOCAL_WORLD_SIZE": "2"}.items():
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            with pytest.raises(ConfigError, match="2 processes were launched, but accelerate sees 1"):
                process_state()


def test_processes_that_do_not_reach_each_other_are_told_what_to_look_at(monkeypatch):
    def unreachable(**options):
        raise RuntimeError("Gloo connectFullMesh failed with timed out connecting\nframe 0")

    monkeypatch.setattr(launch, "PartialState", unreachable)
    with pytest.raises(ProcessError, match=r"does not reach the others \(Gloo .* connecting\). Each machine needs"):
        process_state()


def test_one_process_gets_all_numbers_in_order():
    assert list(claim_indices(3)) == [0, 1, 2] and collective_timeout() == 1800
    assert torch.distributed.is_initialized() is False


def test_what_one_process_must_do_is_refused_to_several(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert main(["push", "meta", "someone/meta"]) == 1
    said = capsys.readouterr().err
    assert "process 1: error: `push` runs in one process, not in 2. Start it without `accelerate launch`." in said
