"""Damaged and hostile adapters by the thousand: each loads, or is refused with the library's own error.

    PYTHONPATH=tests python tests/adapters/test_fuzz.py --inputs 10000

Inputs follow from the seed and their number; a failure names both, so that `--seed S --first N --inputs 1` repeats it.
"""

import argparse
import contextlib
import copy
import json
import random
import tempfile
import time
import warnings
from pathlib import Path

import pytest
import torch
from helpers_adapters import ALL_LINEAR, ATTENTION, make_old, save_adapter
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
#: Values that code trips over.
NASTY = (None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 0.0, -0.5, 1e308, "", "x", "LORA", "../..", "/etc/passwd")
NASTY += (
    "\u0000",
    "a" * 5000,
    "(a+)+$",
    ".*",
    "all-linear",
    "pissa",
    [],
    {},
    [[]],
    [None],
    ["q_proj"],
    {"a": {}},
    [0, -1],
)
KEYS = (
    "r",
    "peft_type",
    "auto_map",
    "auto_mapping",
    "bias",
    "target_modules",
    "rank_pattern",
    "lora_alpha",
    "use_dora",
)
KEYS += ("layers_to_transform", "init_lora_weights", "target_parameters", "runtime_config", "revision", "\ud83d\ude00")


def prepare(folder: Path):
    """Sound adapters, name to files in memory, and the backbone that they were made for."""
    sound = {}
    for name, config in SOUND.items():
        _, twin = save_adapter(folder / name, copy.deepcopy(config), num_hidden_layers=1)
        if name == "old":
            make_old(folder / name)
        sound[name] = {file: (folder / name / file).read_bytes() for file in (CONFIG, WEIGHTS)}
    return sound, Backbone(twin, tiny_processor(), "twin")


def spoil_bytes(data: bytes, rng: random.Random, reach: int | None = None) -> bytes:
    """Flip, cut, insert, double or cut off, within the first `reach` bytes."""
    data, reach = bytearray(data), min(len(data), reach or len(data))
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(reach + 1)
        how = rng.randrange(5)
        if how == 0 and at < len(data):
            data[at] = rng.randrange(256)
        elif how == 1:
            del data[at : at + rng.choice((1, 4, 100))]
        elif how == 2:
            data[at:at] = bytes(rng.randrange(256) for _ in range(rng.choice((1, 8))))
        elif how == 3:
            data[at:at] = data[at : at + rng.randrange(1, 60)]
        elif rng.random() < 0.3:
            del data[at:]
    return bytes(data)


def spoil_json(value, rng: random.Random, keys):
    """Change one place of a JSON value: another value, a key more, less or renamed."""
    if isinstance(value, dict) and (value and rng.random() < 0.85):
        result = dict(value)
        key = rng.choice(sorted(result))
        how = rng.random()
        if how < 0.15:
            del result[key]
        elif how < 0.3:
            result[rng.choice(keys)] = rng.choice(NASTY)
        elif how < 0.4:
            result[key[: rng.randrange(len(key) + 1)] + rng.choice(("", ".", "x", ".weight"))] = result.pop(key)
        else:
            result[key] = spoil_json(result[key], rng, keys)
        return result
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        return [*value[:at], spoil_json(value[at], rng, keys), *value[at + rng.randrange(2) :]]
    if isinstance(value, (int, float)) and rng.random() < 0.5:
        return value + rng.choice((1, -1, 7, 0.5, 2**20))
    return rng.choice(NASTY)


def spoil_header(data: bytes, rng: random.Random) -> bytes:
    """One place of the header's JSON, with the length that fits (or nearly) before it."""
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(spoil_json(json.loads(data[8 : 8 + length]), rng, KEYS)).encode()
    if rng.random() < 0.1:  # a key twice
        header = header[:-1] + b"," + header[1:]
    length_field = len(header) + (rng.choice((0, 0, 0, 1, -1, 2**40)) if rng.random() < 0.3 else 0)
    return length_field.to_bytes(8, "little") + header + data[8 + length :]


def spoil_numbers(data: bytes, rng: random.Random) -> bytes:
    """Numbers of the tensors: NaN, infinity, huge, or noise over a stretch."""
    length = 8 + int.from_bytes(data[:8], "little")
    data, at = bytearray(data), rng.randrange(length, len(data) - 3) // 4 * 4
    stretch = rng.choice((1, 1, 64))
    for place in range(at, min(at + 4 * stretch, len(data) - 3), 4):
        data[place : place + 4] = rng.choice(
            (b"\x00\x00\xc0\x7f", b"\x00\x00\x80\xff", b"\xff\xff\x7f\x7f", b"\x01\x02\x03\x04")
        )
    return bytes(data)


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


def spoil_config(data: bytes, rng: random.Random) -> bytes:
    text = json.dumps(spoil_json(json.loads(data), rng, KEYS))
    if rng.random() < 0.1:
        text = text.replace("null", rng.choice(("NaN", "1e999", "nul", "{}")), 1)
    return text.encode()


def respoil(data: bytes, spoil) -> bytes:
    """`spoil(data)`, or `data` where an earlier change left nothing to parse."""
    try:
        return spoil(data)
    except (ValueError, IndexError):
        return data


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
