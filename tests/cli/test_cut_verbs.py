"""Verbs that are killed at any change of the disk, or that find it full, leave nothing that passes for a result.

Whatever was cut, the same command then makes what an undisturbed one makes, byte for byte.
"""

import os
import resource
import signal

import pytest
from helpers_clip import paper_tensors, save_tiny_pair
from safetensors.torch import save_file

from lora_recycle.cli.main import main


#: How a file or a folder gets its name.
CHANGES = ("replace", "rename", "mkdir", "rmdir", "unlink")


def content(folder):
    """Files that do not hide, by their paths."""
    found = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if not any(x[0] == "." for x in name.split("/"))}


def leftovers(folder):
    return [path.name for path in folder.rglob(".*.partial")]


def killed_at(change, command) -> bool:
    """Run a command in a process that kills itself before its `change`-th change of a name, if it comes to that.

    Returns whether it did.
    """
    child = os.fork()
    if not child:
        left, code = [change], 1
        for name in CHANGES:
            setattr(os, name, _counted(getattr(os, name), left))
        try:
            code = main(command)
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


def _counted(act, left):
    def counted(*names, **options):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return act(*names, **options)

    return counted


@pytest.fixture
def commands(work, tmp_path):
    """What each verb is given, without its output."""
    save_tiny_pair(tmp_path / "clip")
    save_file(paper_tensors(), tmp_path / "lora.safetensors")
    train = ["train-adapters", work / "photos", "--base-model", work / "base", "--classes", 4, "--tasks", 2]
    return {
        "train-adapters": [*train, "--epochs", 1, "--rank", 2],
        "import": ["import", tmp_path / "lora.safetensors", "--base-model", tmp_path / "clip"],
        "export": ["export", work / "meta", "--format", "transformers"],
    }


@pytest.mark.parametrize(
    ("verb", "changes"), [("train-adapters", (0, 3, 6, 9)), ("import", (1, 3)), ("export", (2, 5))]
)
def test_a_kill_at_any_change_of_the_disk(commands, tmp_path, verb, changes):
    def command(folder):
        return [str(word) for word in (*commands[verb], "--output", folder, "--quiet")]

    assert main(command(tmp_path / "whole" / "out")) == 0
    expected = content(tmp_path / "whole" / "out")
    for change in changes:
        folder = tmp_path / str(change) / "out"
        assert killed_at(change, command(folder))
        found = content(folder)
        assert found.items() <= expected.items()  # each file is whole
        if verb == "import":
            assert found in ({}, expected)  # a folder appears in one step
        if verb != "import" or not found:
            assert main(command(folder)) == 0
        assert content(folder) == expected and leftovers(folder.parent) == []


@pytest.fixture
def small_files():
    """No file may be larger than so many bytes, as where a disk or a quota is full."""

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_in_benchmark(work, tmp_path, run, fails, small_files):
    recipe, output = tmp_path / "recipe.yaml", tmp_path / "out"
    data, pools = f"[{{path: {work / 'photos'}}}]", f"{{p: {{adapters: [{work / 'pool'}]}}}}"
    recipe.write_text(f"data: {data}\npools: {pools}\nways: 3\nshots: [1]\nepisodes: 5\ntuning_episodes: 2\n")
    small_files(100)
    line = fails("benchmark", recipe, "--output", output, "--quiet")
    assert f"{output / 'cells'}" in line and "cannot be written: File too large" in line and "same command" in line
    small_files(resource.RLIM_INFINITY)
    assert run("benchmark", recipe, "--output", output, "--quiet")[0] == 0
    assert (output / "results.json").is_file() and leftovers(output) == []


def test_a_full_disk_in_demo(work, tmp_path, run, fails, small_files):
    recipe, output = tmp_path / "recipe.yaml", tmp_path / "demo"
    recipe.write_text(
        "invert: {images_per_class: 2, iterations: 2, keep_ratio: 0.5}\n"
        "distill: {steps: 2, rank: 2, relational_batch: 12}\n"
    )
    command = ["demo", "--pool", work / "pool", "--recipe", recipe, "--output", output, "--quiet"]
    for size, place in ((1_000, "surrogate"), (100_000, "")):
        small_files(size)
        line = fails(*command)
        assert f"{output / place}" in line and "cannot be written: File too large" in line
    small_files(resource.RLIM_INFINITY)
    assert run(*command)[0] == 0
    assert (output / "report.html").is_file() and leftovers(output) == []
