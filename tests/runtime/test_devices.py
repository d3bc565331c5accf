"""Where things are computed: by default what accelerate chooses, else what the command says."""

import os

import pytest
import torch

from lora_recycle.cli.common import checked_device
from lora_recycle.errors import ConfigError
from lora_recycle.runtime.launch import choose_device, process_state


@pytest.fixture(autouse=True)
def private_environment(monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())


def test_without_a_name_it_is_what_accelerate_chooses():
    assert checked_device(None) == choose_device() == process_state().device


def test_accelerate_is_told_of_a_name():
    assert choose_device("cpu") == torch.device("cpu")
    assert os.environ["ACCELERATE_TORCH_DEVICE"] == "cpu"


@pytest.mark.parametrize("name", ["quantum", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(name):
    with pytest.raises(ConfigError, match=f"--device {name}: not available on this machine"):
        choose_device(name)
    assert "ACCELERATE_TORCH_DEVICE" not in os.environ
