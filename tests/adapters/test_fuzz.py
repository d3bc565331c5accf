"""Damaged and hostile adapters by the thousand: each loads, or is refused with the library's own error.

    PYTHONPATH=tests python tests/adapters/test_fuzz.py --inputs 10000

Inputs follow from the seed and their number; a failure names both, so that `--seed S --first N --inputs 1` repeats it.
"""

import argparse
import contextlib
import copy
import random
import tempfile
import time
import warnings
from pathlib import Path

import pytest
import torch
from helpers_adapters import ALL_LINEAR, ATTENTION, make_old, save_adapter
from helpers_fuzz import respoil, spoil_bytes, spoil_config, spoil_header, spoil_numbers
from helpers_tiny import tiny_processor
from peft import AdaLoraConfig, LoHaConfig, LoraConfig, ShiraConfig, UniLoraConfig, VeraConfig
from safetensors.torch import load_file

from lora_recycle.adapters.files import read_config, read_header
from lora_recycle.adapters.load import load_adapter
from lora_recycle.adapters.pull import pull_adapter
from lora_recycle.adapters.weight_deltas import to_adapter
from lora_recycle.backbones.backbone import Backbone
from lora_recycle.errors import LoRARecycleError


CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
HEADED = {"modules_to_save": ["classifier"]}
SOUND = {
    "lora": LoraConfig(r=2, target_modules=ALL_LINEAR, rank_pattern={"fc1": 3}, alpha_pattern={"fc2": 9}, **HEADED),
    "old": LoraConfig(r=2, target_modules=ALL_LINEAR, **HEADED),
    "dora": LoraConfig(r=2, use_dora=True, target_modules=ATTENTION, **HEADED),
    "loha": LoHaConfig(r=2, target_modules=ATTENTION, **HEADED),
    "vera": VeraConfig(r=2, target_modules=ATTENTION, **HEADED),
    "adalora": AdaLoraConfig(init_r=2, total_step=5, target_modules=ATTENTION, **HEADED),
    "shira": ShiraConfig(r=2, target_modules=ATTENTION, **HEADED),
    "unilora": UniLoraConfig(r=2, theta_d_length=16, target_modules=ATTENTION, **HEADED),
}
CARDS = ("labels: [a, b, c]", "id2label: {0: a, 1: b, 2: c}", "labels: 3", "model-index: [1]", "a: *b", "\x00")


def prepare(folder: Path):
    """Sound adapters, name to files in memory, and the backbone that they were made for."""
    sound = {}
    for name, config in SOUND.items():
        _, twin = save_adapter(folder / name, copy.deepcopy(config), num_hidden_layers=1)
        if name == "old":
            make_old(folder / name)
        sound[name] = {file: (folder / name / file).read_bytes() for file in (CONFIG, WEIGHTS)}
    return sound, Backbone(twin, tiny_processor(), "twin")


def make_input(sound, rng: random.Random) -> dict[str, bytes]:
    """The files of one input: those of a sound adapter, one to three times spoilt."""
    files = dict(sound[rng.choice(sorted(sound))])
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        how = rng.randrange(8)
        if how == 0:
            files[CONFIG] = spoil_bytes(files[CONFIG], rng)
        elif how == 1:
            files[WEIGHTS] = spoil_bytes(files[WEIGHTS], rng, reach=2000)
        elif how == 2:
            files[WEIGHTS] = respoil(files[WEIGHTS], lambda data: spoil_numbers(data, rng))
        elif how == 3:
            files[CARD] = f"---\n{rng.choice(CARDS)}\n---\n".encode()
            files[CARD] = spoil_bytes(files[CARD], rng) if rng.random() < 0.7 else files[CARD]
        elif how in (4, 5):
            files[CONFIG] = respoil(files[CONFIG], lambda data: spoil_config(data, rng))
        elif how == 6:
            files[WEIGHTS] = respoil(files[WEIGHTS], lambda data: spoil_header(data, rng))
        else:  # the config of one with the tensors of another
            files[CONFIG] = sound[rng.choice(sorted(sound))][CONFIG]
    return files


def attempt(folder: Path, files: dict[str, bytes], backbone: Backbone, merge: bool = True) -> str:
    """`loaded`, or the message of the library's own error; every other exception goes through."""
    for file in (CONFIG, WEIGHTS, CARD):
        (folder / file).unlink(missing_ok=True)
        if file in files:
            (folder / file).write_bytes(files[file])
    for read in (read_config, read_header):
        with contextlib.suppress(LoRARecycleError):
            read(folder, "fuzz")
    try:
        loaded = load_adapter(pull_adapter(folder), backbone.model)
        adapter = to_adapter(loaded, backbone) if merge else None
    except LoRARecycleError as error:
        assert folder.name in str(error), f"the error does not say where: {error}"
        return str(error)
    assert not merge or all(torch.isfinite(t).all() for pair in adapter.factors.values() for t in pair)
    return "loaded"


def fuzz(folder: Path, inputs: int, seed: int = 0, first: int = 0, merge_each: int = 1) -> dict[str, float]:
    """Try `inputs` inputs, and turn each `merge_each`-th that loads into weight changes.

    Returns how many loaded, and the longest time that one took, in seconds.
    """
    sound, backbone = prepare(folder)
    before = {key: value.clone() for key, value in backbone.model.state_dict().items()}
    place = folder / "stranger"
    place.mkdir()
    for name, files in sound.items():
        said = attempt(place, files, backbone)
        assert said == "loaded", f"{name}: {said}"
    loaded, slowest = 0, 0.0
    for number in range(first, first + inputs):
        files = make_input(sound, random.Random(f"{seed}/{number}"))
        started = time.perf_counter()
        try:
            loaded += attempt(place, files, backbone, number % merge_each == 0) == "loaded"
        except Exception as error:
            raise AssertionError(f"input {number} of seed {seed}: {type(error).__name__}: {error}") from error
        slowest = max(slowest, time.perf_counter() - started)
    assert all(torch.equal(before[key], value) for key, value in backbone.model.state_dict().items())
    return {"inputs": inputs, "loaded": loaded, "slowest": round(slowest, 2)}


@pytest.mark.filterwarnings("ignore")
def test_damaged_adapters_load_or_are_refused(tmp_path):
    result = fuzz(tmp_path, 1000, merge_each=5)
    assert 20 < result["loaded"] < 900  # both ways were walked


def test_the_fuzzer_changes_what_it_says(tmp_path):
    save_adapter(tmp_path, copy.deepcopy(SOUND["lora"]))
    data, rng = (tmp_path / WEIGHTS).read_bytes(), random.Random(0)
    for spoil in (spoil_bytes, spoil_header, spoil_numbers):
        assert any(spoil(data, rng) != data for _ in range(5))
    (tmp_path / WEIGHTS).write_bytes(spoil_numbers(data, rng))
    assert load_file(tmp_path / WEIGHTS).keys()  # still a sound file


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as scratch:
        began = time.perf_counter()
        outcome = fuzz(Path(scratch), arguments.inputs, arguments.seed, arguments.first)
    print(outcome | {"seconds": round(time.perf_counter() - began)})
