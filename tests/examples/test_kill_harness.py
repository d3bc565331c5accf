"""The harness itself, on real processes; and that it would notice a difference."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


EXAMPLES = Path(__file__).parents[2] / "examples" / "tools"


@pytest.fixture
def kill_harness(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    return importlib.import_module("kill_harness")


@pytest.mark.slow
def test_killed_runs_end_as_undisturbed_ones():
    command = [sys.executable, EXAMPLES / "kill_harness.py", "--quick", "--kills", "2", "--signals", "KILL", "TERM"]
    # whose lines count is tested elsewhere; to count them here takes minutes
    uncounted = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    done = subprocess.run(command, capture_output=True, text=True, env=uncounted)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "2 kills, 2 resumes, 0 differences"
    assert len(re.findall(r"^kill \d: (invert|distill) after [\d.]+ s of work$", done.stdout, re.MULTILINE)) == 2


def test_what_counts_as_a_difference(kill_harness, tmp_path):
    for run in ("one", "other"):
        for name in ("surrogate/shards/a.safetensors", "meta_lora/adapter_model.safetensors"):
            path = tmp_path / run / name
            path.parent.mkdir(parents=True)
            path.write_bytes(b"same")
    (tmp_path / "one" / "meta_lora" / "work").mkdir()
    (tmp_path / "one" / "meta_lora" / "work" / "checkpoint-1.safetensors").touch()
    (tmp_path / "other" / "surrogate" / ".lock").touch()
    one, other = (kill_harness.content(tmp_path / run) for run in ("one", "other"))
    assert kill_harness.differences(one, other) == []
    (tmp_path / "other" / "surrogate" / "shards" / "a.safetensors").write_bytes(b"else")
    (tmp_path / "other" / "surrogate" / "shards" / "b.safetensors").write_bytes(b"more")
    (tmp_path / "other" / "meta_lora" / "adapter_model.safetensors").unlink()
    found = kill_harness.differences(one, kill_harness.content(tmp_path / "other"))
    assert found == [
        "meta_lora/adapter_model.safetensors",
        "surrogate/shards/a.safetensors",
        "surrogate/shards/b.safetensors",
    ]


def test_a_stage_that_fails_is_no_kill(kill_harness, tmp_path):
    broken = kill_harness.Stage("distill", ["{}/nothing", "--surrogate", "{}/nothing", "--output", "{}/meta_lora"])
    with pytest.raises(SystemExit, match="distill ended with 1:(.|\n)*nothing"):
        kill_harness.attempt(broken, tmp_path, False, kill_harness.Kill("KILL", 0.0, False))
