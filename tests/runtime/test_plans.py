"""Plans as text, and what they measure with."""

import pytest
import torch

from lora_recycle.runtime import plans
from lora_recycle.runtime.plans import Plan, Stage, duration, peak_memory, seconds_of, size


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (41.6, "42 s"),
        (59.7, "1 min 0 s"),
        (200, "3 min 20 s"),
        (7500, "2 h 5 min"),
        (4_000_000, "1,111 h 6 min"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_sizes():
    assert (size(1_500_000), size(2_340_000_000)) == ("1.5 MB", "2.3 GB")


def test_a_plan_adds_up():
    plan = Plan([Stage("a", "one", 1.5, 2000.4), Stage("b", "two", 62)], 10**6, 2 * 10**9, processes=2)
    assert plan.rows() == [
        ("a", "one", "2,000", "1.5 s"),
        ("b", "two", "-", "1 min 2 s"),
        ("total", "", "2,000", "1 min 4 s"),
    ]
    assert plan.summary() == "memory 1.0 MB, each of 2 processes; disk 2.0 GB"


def test_the_median_step_counts_and_the_first_does_not(monkeypatch):
    times = iter([100.0, 1.0, 30.0, 2.0])  # a warm-up, then three
    now = [0.0]
    monkeypatch.setattr(plans, "clock", lambda: now[0])

    def step():
        now[0] += next(times)

    assert seconds_of(step, torch.device("cpu")) == 2.0


def test_memory_of_this_process():
    assert 2**26 < peak_memory(torch.device("cpu")) < 2**40  # with torch loaded: bytes, neither pages nor kilobytes
