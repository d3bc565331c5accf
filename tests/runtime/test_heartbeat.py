"""What processes tell each other, without any: launches are in `test_launch.py`."""

from types import SimpleNamespace

import pytest
import torch

from lora_recycle.errors import ProcessError
from lora_recycle.runtime import heartbeat
from lora_recycle.runtime.heartbeat import Heartbeat


class Gone:
    """The store of a process that has ended."""

    def set(self, key, value):
        raise torch.distributed.DistNetworkError("Broken pipe")


@pytest.fixture(autouse=True)
def second_of_two(monkeypatch):
    monkeypatch.setattr(heartbeat, "process_state", lambda: SimpleNamespace(process_index=1, num_processes=2))
    monkeypatch.setattr(heartbeat, "shared_store", lambda name: Gone())


def test_who_is_done_last_has_nobody_to_tell():
    with Heartbeat("begin"):
        pass


def test_who_needs_the_others_says_that_they_are_gone():
    with pytest.raises(ProcessError, match="begin: process 1 lost the others: one of them failed.*Broken pipe"):
        with Heartbeat("begin") as heart:
            heart.wait_for_all()
