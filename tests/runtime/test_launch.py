"""Launches of several real processes, which meet over gloo: what they make, and how they fail."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_launch import EXACT, INVERT, LAUNCHED, distill, environment, furthest
from safetensors.torch import load_file


pytestmark = pytest.mark.slow

#: Judged, with every step a change of the student.
JUDGED = ["--validation-fraction", "0.2", "--groups", "one", "--eval-steps", "2", "--init", "zero", "--lr", "0.03"]
#: The pool's average is judged, and blends of what is learnt.
PART = ["--validation-fraction", "0.2", "--groups", "one", "--eval-steps", "2"]


def accelerate_launch(*arguments, **changes):
    """`accelerate launch` as FACTS has it: on CPU it starts several processes only so."""
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment(**changes))


def meta_lora(folder):
    return load_file(Path(folder) / "adapter_model.safetensors")


def losses_of(folder):
    return json.loads((Path(folder) / "work" / "training_log.json").read_text())


def judged_in(folder):
    return json.loads((Path(folder) / "meta_lora_config.json").read_text())["judged"]


@pytest.fixture(scope="module")
def forked(tmp_path_factory, plain_pool_path, plain_surrogate):
    """Launches whose processes are forked: name to (exit code, all that they said, folder)."""
    work, surrogate = tmp_path_factory.mktemp("forked"), plain_surrogate.folder
    kinds = {
        "one": (1, {}),
        "four": (4, {}),
        "best one": (1, {}),
        "best two": (2, {}),
        "part one": (1, {}),
        "part two": (2, {}),
        "bf16 one": (1, {"ACCELERATE_MIXED_PRECISION": "bf16"}),
        "bf16": (2, {"ACCELERATE_MIXED_PRECISION": "bf16"}),
        "raise": (2, {}),
        "silent": (2, {"LORA_RECYCLE_TIMEOUT": "10"}),
    }
    settings = {"best": JUDGED, "part": PART}
    before = {"best": [["float64"], ["best", "4"]], "bf16": []}
    before |= {"raise": [["fault", "raise", "1"]], "silent": [["fault", "hang", "1"]]}
    scenarios = []
    for name, (processes, changes) in kinds.items():
        kind = name.partition(" ")[0]
        command = distill(plain_pool_path, surrogate, work / name, *settings.get(kind, ()))
        commands = [*before.get(kind, [["float64"]]), command]
        scenarios.append({"processes": processes, "environment": changes, "commands": commands})
    scenarios.append({"processes": 2, "commands": [["deal", "12"]]})
    names = [*kinds, "deal"]
    for name, scenario in zip(names, scenarios, strict=True):
        scenario["log"] = str(work / f"{name}.log")
    command = [sys.executable, str(LAUNCHED), "--fork", json.dumps(scenarios)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment())
    codes = json.loads(ran.stdout)
    return {n: (c, (work / f"{n}.log").read_text(), work / n) for n, c in zip(names, codes, strict=True)}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, plain_pool_path, plain_surrogate):
    """`accelerate launch` of two processes: both stages, then a training in which the second one fails. What was said,
    and where `surrogate`, `meta` and `failed` are."""
    work = tmp_path_factory.mktemp("two")
    commands = [
        ["invert", str(plain_pool_path), "--output", str(work / "surrogate"), *INVERT],
        ["float64"],
        distill(plain_pool_path, plain_surrogate.folder, work / "meta"),
        ["fault", "raise", "1"],
        distill(plain_pool_path, plain_surrogate.folder, work / "failed"),
    ]
    launched = [LAUNCHED, json.dumps({"commands": commands})]
    return accelerate_launch("--multi_gpu", "--num_processes", 2, *launched), work


def test_two_processes_make_the_same_shards(two_processes, inverted):
    for entry in inverted.manifest["shards"]:
        made = two_processes[1] / "surrogate" / entry["file"]
        assert made.read_bytes() == (inverted.folder / entry["file"]).read_bytes()
    assert json.loads((two_processes[1] / "surrogate" / "manifest.json").read_text()) == inverted.manifest


def test_only_the_main_process_reports(two_processes):
    lines = two_processes[0].stdout.splitlines()
    assert sum(line.startswith("adapter-0 ") for line in lines) == 1
    assert sum(line.startswith("relational ") for line in lines) == 1
    assert two_processes[0].stderr.count("Next: ") == 2


def test_one_two_and_four_processes_make_the_same_meta_lora(two_processes, forked):
    assert forked["four"][0] == 0, forked["four"][1]
    one = meta_lora(forked["one"][2])
    assert max(value.abs().max() for value in one.values()) > 0.1
    assert furthest(one, meta_lora(two_processes[1] / "meta")) < EXACT
    assert furthest(one, meta_lora(forked["four"][2])) < EXACT
    losses = losses_of(forked["four"][2])
    for name, values in losses_of(forked["one"][2]).items():
        assert values == pytest.approx(losses[name], rel=1e-4)


def assert_judged_alike(folder, other):
    one, two = judged_in(folder), judged_in(other)
    for name in ("figures", "rises"):
        assert one[name] == pytest.approx(two.pop(name), abs=0.5)  # per cent of 60 episodes
    assert {key: one[key] for key in two} == two and two["steps"][-4:] == [0, 2, 4, 6] and len(two["adapters"]) == 1


def test_processes_keep_the_same_best(forked):
    code, said, folder = forked["best two"]
    assert code == 0, said
    assert_judged_alike(folder, forked["best one"][2])
    assert furthest(meta_lora(folder), meta_lora(forked["best one"][2])) < EXACT
    assert judged_in(folder)["best_step"] == 4 and said.count("Step 4 of 6 is kept") == 1


def test_processes_judge_the_same_blends_and_keep_the_same(forked):
    code, said, folder = forked["part two"]
    assert code == 0, said
    assert_judged_alike(folder, forked["part one"][2])
    assert furthest(meta_lora(folder), meta_lora(forked["part one"][2])) < EXACT
    judged = judged_in(forked["part one"][2])
    assert judged["blends"] == [[0, 0], [0, 1]] + 3 * [[0.25, 0.75]]


def test_bfloat16_on_two_processes(forked):
    assert forked["bf16 one"][0] == forked["bf16"][0] == 0, forked["bf16"][1]
    exact, one, two = (losses_of(forked[name][2]) for name in ("one", "bf16 one", "bf16"))
    assert one != exact  # it is really rounded
    for name, values in one.items():
        assert two[name] == pytest.approx(values, rel=0.05)


def test_a_failing_process_is_named_and_ends_the_launch(two_processes, forked):
    ran, work = two_processes  # a hang would outlast the time that `accelerate_launch` gives it
    said = "lora-recycle: process 1: error: planted: the disk of this process is gone"
    assert ran.returncode != 0 and said in ran.stderr
    assert not (work / "failed" / "adapter_model.safetensors").exists()
    assert forked["raise"][0] == 1 and said in forked["raise"][1]
    assert "process 0: error: distill: process 0 lost the others" in forked["raise"][1]


def test_a_silent_process_is_named_and_ends_the_launch(forked):
    code, said, _ = forked["silent"]
    assert code == 1
    assert "lora-recycle: distill: process 1 (pid " in said and ") has made no progress for " in said
    assert "process 0: error: distill: process 0 lost the others: process 1 (pid " in said


def test_a_slow_process_holds_nobody_up(forked):
    found = {told["rank"]: told["numbers"] for told in map(json.loads, forked["deal"][1].splitlines())}
    assert sorted(found[0] + found[1]) == list(range(12)) and len(found[0]) <= 4 < len(found[1])


def test_a_launch_that_became_one_process_is_refused(tmp_path):
    ran = accelerate_launch("--cpu", "--num_processes", 2, "-m", "lora_recycle", "invert", "x", "--output", tmp_path)
    assert ran.returncode != 0
    assert "was asked for several processes, but started one" in ran.stderr and "--multi_gpu" in ran.stderr
