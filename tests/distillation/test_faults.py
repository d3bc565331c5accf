"""What goes wrong in long runs: each fault is noticed, told, and costs nothing but the time until it is gone."""

import os
import re
import time
from pathlib import Path

import pytest
import torch

from lora_recycle.distillation import trainer as trainer_module
from lora_recycle.distillation.config import DistillationConfig
from lora_recycle.distillation.schedule import learning_rate
from lora_recycle.distillation.trainer import MetaLoRATrainer
from lora_recycle.errors import ConfigError, DataError, StorageError
from lora_recycle.inversion.config import InversionConfig
from lora_recycle.inversion.inverter import LoRAInverter
from lora_recycle.runtime.files import load_sealed, save_sealed
from lora_recycle.runtime.run_lock import only_run_in


@pytest.fixture(scope="module")
def pool(tiny_pool):
    return tiny_pool


INVERSION = InversionConfig(images_per_class=3, iterations=2, jitter=1)
DISTILLATION = DistillationConfig(
    steps=8, rank=4, relational_batch=8, save_steps=2, eval_steps=3, groups="one", lr=0.03, init="zero"
)


def invert(pool, folder):
    return LoRAInverter(pool, INVERSION).run(folder, progress=False)


def distil(pool, surrogate, folder):
    """The weights as bytes, the losses, and what was judged."""
    trainer = MetaLoRATrainer(pool, surrogate, DISTILLATION)
    student = trainer.train(folder, progress=False)
    return [p.detach().numpy().tobytes() for p in student.trainable()], trainer.history, trainer.selection.to_dict()


def files(folder):
    """Content of all files but those that hide."""
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")}


@pytest.fixture(scope="module")
def undisturbed(pool, tmp_path_factory):
    """Surrogate data, and weights and losses."""
    folder = tmp_path_factory.mktemp("undisturbed")
    surrogate = invert(pool, folder / "surrogate")
    return surrogate, distil(pool, surrogate, folder / "work")


def at_step(monkeypatch, step, act):
    """`act` is called once, when training comes to `step`."""
    left = [act]

    def hooked(config, now):
        if now == step and left:
            left.pop()()
        return learning_rate(config, now)

    monkeypatch.setattr(trainer_module, "learning_rate", hooked)


def test_a_disk_that_is_full_while_inverting(pool, undisturbed, tmp_path, file_size_limit):
    with file_size_limit(20_000), pytest.raises(StorageError, match=r"safetensors cannot be written: File too large"):
        invert(pool, tmp_path)
    assert not files(tmp_path)
    invert(pool, tmp_path)
    assert files(tmp_path) == files(undisturbed[0].folder)


def test_a_disk_that_fills_up_while_training(pool, undisturbed, tmp_path, monkeypatch, file_size_limit):
    limits = file_size_limit(20_000)
    at_step(monkeypatch, 5, limits.__enter__)
    with pytest.raises(StorageError, match="checkpoint-00000006.safetensors cannot be written: File too large"):
        distil(pool, undisturbed[0], tmp_path)
    limits.__exit__(None, None, None)
    assert [p.name for p in sorted(tmp_path.glob("checkpoint-*"))] == [
        "checkpoint-00000002.safetensors",
        "checkpoint-00000004.safetensors",
    ]
    assert distil(pool, undisturbed[0], tmp_path) == undisturbed[1]


def test_the_last_two_checkpoints_are_kept_and_hold_all_that_training_is(pool, undisturbed, tmp_path):
    distil(pool, undisturbed[0], tmp_path)
    found = sorted(tmp_path.glob("checkpoint-*"))
    assert [int(p.stem.split("-")[1]) for p in found] == [6, 8]
    tensors, header = load_sealed(found[0])
    count = len(undisturbed[1][0])
    expected = {f"{i}.{name}" for i in range(count) for name in ("value", "exp_avg", "exp_avg_sq", "step")}
    best = {f"best.{i}" for i in range(count)}
    assert tensors.keys() == expected | best | {"rng.cpu", "judged.first"} and tensors["0.step"] == 6
    assert header["step"] == 6 and header["learning_rates"] == [learning_rate(DISTILLATION, 5)]
    assert {name: len(values) for name, values in header["history"].items()} == {"relational": 6}
    assert header["judged"]["steps"] == [0, 3, 6] and len(header["judged"]["figures"]) == 3
    assert header["identity"]["config"] == DISTILLATION.to_dict()


def test_a_checkpoint_of_an_earlier_version_is_told(pool, undisturbed, tmp_path):
    distil(pool, undisturbed[0], tmp_path)
    for path in tmp_path.glob("checkpoint-*.safetensors"):
        tensors, header = load_sealed(path)
        del header["judged"]["rises"]
        save_sealed(path, tensors, header)
    with pytest.raises(ConfigError, match=r"checkpoint-00000008.*of an earlier version of lora_recycle.*--no-resume"):
        distil(pool, undisturbed[0], tmp_path)


def test_the_generators_go_on_where_they_were(pool, undisturbed, tmp_path):
    distil(pool, undisturbed[0], tmp_path)
    expected = torch.rand(3)
    torch.manual_seed(1234)
    distil(pool, undisturbed[0], tmp_path)  # resumes at its end
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(pool, undisturbed, tmp_path, monkeypatch, damage, caplog):
    distil(pool, undisturbed[0], tmp_path)
    newest = tmp_path / "checkpoint-00000008.safetensors"
    whole = newest.read_bytes()
    flipped = whole[:-9] + bytes([whole[-9] ^ 4]) + whole[-8:]
    newest.write_bytes({"cut": whole[:-100], "flipped": flipped, "empty": b""}[damage])
    steps = []
    monkeypatch.setattr(trainer_module, "learning_rate", lambda c, s: steps.append(s) or learning_rate(c, s))
    assert distil(pool, undisturbed[0], tmp_path) == undisturbed[1]
    assert steps == [6, 7] and newest.read_bytes() == whole
    assert "checkpoint-00000008.safetensors is damaged" in caplog.text
    assert "going on from checkpoint-00000006.safetensors" in caplog.text


def test_a_shard_that_is_damaged_stops_training_and_is_made_anew(pool, undisturbed, tmp_path):
    surrogate = invert(pool, tmp_path / "surrogate")
    path = tmp_path / "surrogate" / surrogate.manifest["shards"][1]["file"]
    whole = path.read_bytes()
    path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 4]) + whole[-8:])
    with pytest.raises(DataError, match=f"{path}: missing, or not the file that manifest.json describes. Run invert"):
        distil(pool, surrogate, tmp_path / "work")
    assert files(invert(pool, tmp_path / "surrogate").folder) == files(undisturbed[0].folder)
    assert distil(pool, surrogate, tmp_path / "work") == undisturbed[1]


def test_two_runs_in_one_folder(pool, undisturbed, tmp_path):
    with only_run_in(tmp_path):  # the other run
        with pytest.raises(StorageError, match="at work here. Wait for it, or choose another folder"):
            invert(pool, tmp_path)
        with pytest.raises(StorageError, match="at work here"):
            distil(pool, undisturbed[0], tmp_path)
    assert not files(tmp_path)
    assert distil(pool, undisturbed[0], tmp_path) == undisturbed[1]


def test_a_clock_that_jumps(pool, undisturbed, tmp_path, monkeypatch):
    """Backwards, by years, during the runs and between them: nothing asks what time it is."""
    now = [time.time()]

    def jumping():
        now[0] -= 40_000_000
        return now[0]

    monkeypatch.setattr(time, "time", jumping)
    monkeypatch.setattr(time, "time_ns", lambda: int(jumping() * 1e9))

    def interrupt():
        raise KeyboardInterrupt

    surrogate = invert(pool, tmp_path / "surrogate")
    at_step(monkeypatch, 5, interrupt)
    with pytest.raises(KeyboardInterrupt):
        distil(pool, surrogate, tmp_path / "work")
    for path in tmp_path.rglob("*"):
        os.utime(path, (4e9, 4e9) if path.name == "checkpoint-00000002.safetensors" else (1e6, 1e6))
    (tmp_path / "surrogate" / surrogate.manifest["shards"][1]["file"]).unlink()
    assert files(invert(pool, tmp_path / "surrogate").folder) == files(undisturbed[0].folder)
    steps = []
    monkeypatch.setattr(trainer_module, "learning_rate", lambda c, s: steps.append(s) or learning_rate(c, s))
    assert distil(pool, surrogate, tmp_path / "work") == undisturbed[1]
    assert steps == [4, 5, 6, 7]  # from the checkpoint of the later step, which looks decades older


def test_the_fault_table_names_tests_that_are_there():
    root = Path(__file__).parents[2]
    rows = [row for row in (root / "docs" / "reliability.md").read_text().splitlines() if row.startswith("| ")][1:]
    assert len(rows) == 43
    for row in rows:
        told = row.rsplit("|", 2)[1]
        tests = "".join((root / path).read_text() for path in re.findall(r"`((?:tests|examples)/[\w/]+\.py)`", told))
        names = re.findall(r"`(test_\w+)`", told)
        assert all(f"def {name}(" in tests for name in names), row
        assert names or "kill_harness" in told or told.strip() == "the same"
