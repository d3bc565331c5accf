"""Ctrl-C and SIGTERM at the command line: saved, told how to go on, and then as if nothing had been."""

import json
import shlex
import signal
import threading

import pytest

from lora_recycle.cli import main as command_line
from lora_recycle.distillation import trainer as trainer_module
from lora_recycle.distillation.schedule import learning_rate
from lora_recycle.inversion.inverter import LoRAInverter
from lora_recycle.runtime.signals import Interruption, Terminated, terminable


@pytest.fixture(autouse=True)
def own_signals():
    """A job in the background ignores Ctrl-C, and so would its tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


ENDS = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (143, "terminated")}


def content(folder):
    names = ("adapter_config.json", "adapter_model.safetensors", "meta_lora_config.json")
    return [(folder / name).read_bytes() for name in names]


def way_on(err):
    """The command that the message ends with, without the program."""
    command = shlex.split(err.strip().splitlines()[-1].partition("To continue: ")[2])
    assert command[0] == "lora-recycle" and command[-1] == "--resume"
    return command[1:]


@pytest.mark.parametrize("number", ENDS)
def test_training_that_is_stopped_saves_its_step_and_goes_on(work, tmp_path, run, monkeypatch, number):
    recipe = ["--steps", 5, "--rank", 2, "--relational-batch", 12, "--quiet"]
    command = ["distill", work / "pool", "--surrogate", work / "surrogate", *recipe, "--output"]
    assert run(*command, tmp_path / "whole")[0] == 0
    seen = []

    def hooked(config, step):
        seen.append(step)
        if seen == [0, 1, 2]:
            signal.raise_signal(number)
        return learning_rate(config, step)

    monkeypatch.setattr(trainer_module, "learning_rate", hooked)
    handlers = [signal.getsignal(n) for n in ENDS]
    code, out, err = run(*command, tmp_path / "a b")
    assert code == ENDS[number][0] and out == "" and "Traceback" not in err
    assert err.strip().startswith(f"lora-recycle: {ENDS[number][1]}; finished work is kept. To continue: ")
    assert [p.name for p in (tmp_path / "a b" / "work").glob("checkpoint-*")] == ["checkpoint-00000003.safetensors"]
    assert [signal.getsignal(n) for n in ENDS] == handlers
    assert run(*way_on(err))[0] == 0 and seen == [0, 1, 2, 3, 4]
    assert content(tmp_path / "a b") == content(tmp_path / "whole")


@pytest.mark.parametrize("number", ENDS)
def test_inversion_that_is_stopped_keeps_its_shards_and_goes_on(work, tmp_path, run, monkeypatch, number):
    options = ["--images-per-class", 2, "--iterations", 2, "--keep-ratio", 0.5, "--quiet", "--output", tmp_path / "s"]
    invert, made = LoRAInverter.invert, []

    def hooked(self, index):
        made.append(index)
        if made == [0, 1]:
            signal.raise_signal(number)
        return invert(self, index)

    monkeypatch.setattr(LoRAInverter, "invert", hooked)
    code, out, err = run("invert", work / "pool", *options)
    assert code == ENDS[number][0] and out == "" and "Traceback" not in err
    assert len(list((tmp_path / "s" / "shards").iterdir())) == 1 and not (tmp_path / "s" / "manifest.json").exists()
    assert run(*way_on(err))[0] == 0 and made == [0, 1, 1, 2]
    for path in (work / "surrogate" / "shards").iterdir():
        assert (tmp_path / "s" / "shards" / path.name).read_bytes() == path.read_bytes()


def test_verbs_without_resume_and_launches_are_told_what_fits(monkeypatch, capsys):
    def interrupted(_):
        raise Terminated

    monkeypatch.setattr(command_line.inspect, "run", interrupted)
    monkeypatch.setattr(command_line.invert, "run", interrupted)
    assert command_line.main(["inspect", "x"]) == 143
    assert capsys.readouterr().err.strip() == "lora-recycle: terminated; finished work is kept."
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert command_line.main(["invert", "x", "--output", "o", "--no-resume"]) == 143
    assert "Launch the same command again, with --resume" in capsys.readouterr().err


def test_no_resume_starts_again(work, tmp_path, run):
    command = [
        "distill",
        work / "pool",
        "--surrogate",
        work / "surrogate",
        "--output",
        tmp_path,
        "--rank",
        2,
        "--quiet",
    ]
    assert run(*command, "--relational-batch", 12, "--steps", 2)[0] == 0
    code, _, err = run(*command, "--relational-batch", 12, "--steps", 3)
    assert code == 1 and "(steps: 2 there, 3 here)" in err and "--no-resume" in err
    assert run(*command, "--relational-batch", 12, "--steps", 3, "--no-resume")[0] == 0
    assert len(json.loads((tmp_path / "work" / "training_log.json").read_text())["relational"]) == 3


def test_a_second_signal_ends_at_once_unless_there_are_many_processes():
    for patient in (False, True):
        interruption = Interruption(patient)
        try:
            assert not interruption.asked
            signal.raise_signal(signal.SIGINT)
            assert interruption.asked
            if patient:
                signal.raise_signal(signal.SIGINT)
            else:
                with pytest.raises(KeyboardInterrupt):
                    signal.raise_signal(signal.SIGINT)
        finally:
            interruption.release()
    with terminable(), pytest.raises(Terminated):
        signal.raise_signal(signal.SIGTERM)


def test_ignored_signals_stay_ignored_and_other_threads_have_none():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        interruption = Interruption()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        interruption.release()
    finally:
        signal.signal(signal.SIGINT, before)
    found = []

    def in_thread():
        found.append(Interruption().asked)

    thread = threading.Thread(target=in_thread)
    thread.start()
    thread.join()
    assert found == [False]
