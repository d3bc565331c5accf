"""The example that serves many tasks runs, and its answers do not depend on how they are asked for."""

import importlib
import sys
from pathlib import Path


EXAMPLES = Path(__file__).parents[2] / "examples"


def test_it_runs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    example = importlib.import_module("serve_many_tasks")
    found = example.main(["--tasks", "4", "--queries", "6", "--rounds", "1", "--threads", "3"])
    assert found["tasks"] == 4 and found["threads that got other answers"] == 0
    assert found["kB of a task"] == (2 * 5 * 192 + 5) * 4 / 1e3  # sums and prototypes of 5 classes, and the counts
    assert "answers in a second, one forward pass" in capsys.readouterr().out
