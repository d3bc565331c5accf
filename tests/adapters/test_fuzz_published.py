"""Hostile cards, coded weights and sidecars by the thousand: each is read and passed on, or refused with our error.

    PYTHONPATH=tests:tests/adapters python tests/adapters/test_fuzz_published.py --kind card --inputs 10000

The checksums that a sidecar states are right, as a hostile author would make them. Inputs follow from the seed and
their number; a failure names both, so that `--seed S --first N --inputs 1` repeats it.
"""

import argparse
import json
import random
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
import yaml
from helpers_fuzz import KEYS, respoil, spoil_bytes, spoil_config, spoil_header, spoil_json, spoil_numbers

from lora_recycle.adapters.files import checksums
from lora_recycle.adapters.pull import pull_adapter, read_tensors
from lora_recycle.errors import LoRARecycleError
from lora_recycle.fewshot.heads import make_head
from lora_recycle.hub.embedded import meta_lora_path
from lora_recycle.hub.licenses import inherited_license, read_license
from lora_recycle.hub.repo_files import CARD_FILE, CODES_FILE, CONFIG_FILE, SIDECAR_FILE, WEIGHTS_FILE
from lora_recycle.modeling.publishing import adapter_files, write_adapter
from lora_recycle.modeling.sidecar import read_sidecar


FRONT = {"license": "other", "license_name": "x-1", "base_model": "/home/me/base", "labels": ["a", "b"], "tags": ["x"]}
FRONT |= {"id2label": {0: "a", 1: "b"}, "model-index": [{"name": "n", "results": []}], "language": None}
ROW = {"method": "meta-lora", "data": "d", "ways": 5, "shots": 1, "episodes": 9, "accuracy": 50.0, "ci95": 1.0}
ROW |= {"delta_vs_frozen": 1.0, "delta_ci95": 0.5}
EPISODE = (torch.eye(4)[:3], torch.tensor([0, 1, 1]), 2, torch.eye(4))


def prepare(folder: Path) -> dict[str, dict[str, bytes]]:
    """Files of a sound input of each kind, all from the embedded meta-LoRA."""
    plain, coded = folder / "plain", folder / "coded"
    shutil.copytree(meta_lora_path(), plain)
    if (plain / CODES_FILE).exists():
        write_adapter(pull_adapter(meta_lora_path()), folder / "decoded", 32)
        plain = folder / "decoded"
    write_adapter(pull_adapter(plain), coded, 4)
    sidecar = json.loads((plain / SIDECAR_FILE).read_text(encoding="utf-8")) | {"results": [ROW]}
    wanted = (CONFIG_FILE, WEIGHTS_FILE, SIDECAR_FILE)
    files = {name: (plain / name).read_bytes() for name in wanted} | {SIDECAR_FILE: json.dumps(sidecar).encode()}
    adapter = {name: files[name] for name in (CONFIG_FILE, WEIGHTS_FILE)}
    card = f"---\n{yaml.safe_dump(FRONT)}---\n# A card of /home/me/base\n".encode()
    codes = {name: (coded / name).read_bytes() for name in (CONFIG_FILE, CODES_FILE)}
    return {"sidecar": files, "card": adapter | {CARD_FILE: card}, "codes": codes}


def spoil(kind: str, data: bytes, rng: random.Random) -> bytes:
    """One to three changes."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        if kind == "card":
            how = rng.choice((spoil_bytes, spoil_front))
        elif kind == "sidecar":
            how = rng.choice((spoil_config, spoil_config, spoil_config, spoil_bytes))
        else:
            how = rng.choice((spoil_header, spoil_metadata, spoil_numbers, spoil_codes))
        try:
            data = respoil(data, lambda data, how=how: how(data, rng))
        except (KeyError, TypeError, AttributeError, yaml.YAMLError):
            continue  # an earlier change took what this one looks for
    return data


def spoil_front(data: bytes, rng: random.Random) -> bytes:
    front = yaml.safe_load(data.decode().split("---\n")[1])
    changed = yaml.safe_dump(spoil_json(front, rng, [*KEYS, "license", "labels", "base_model"]), allow_unicode=True)
    return f"---\n{changed}---\ntext\n".encode()


def spoil_codes(data: bytes, rng: random.Random) -> bytes:
    return spoil_bytes(data, rng, reach=1500)


def spoil_metadata(data: bytes, rng: random.Random) -> bytes:
    """One place of the JSON inside the header's JSON."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    inner = spoil_json(json.loads(header["__metadata__"]["header"]), rng, ["bits", "shapes", "codes"])
    text = json.dumps(header | {"__metadata__": {"header": json.dumps(inner)}}).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def repair(folder: Path) -> None:
    """The sidecar's checksums, where there is still a place for them."""
    try:
        settings = json.loads((folder / SIDECAR_FILE).read_text(encoding="utf-8"))
        settings["checksums"] = checksums(folder)
        text = json.dumps(settings, allow_nan=False)
    except (ValueError, TypeError, RecursionError):
        return
    (folder / SIDECAR_FILE).write_text(text, encoding="utf-8")


def attempt(folder: Path, kind: str) -> bool:
    """Whether the folder is read, and what would be published of it can be written; only our errors count as no."""
    try:
        info = pull_adapter(folder)
        if kind == "codes":
            tensors = read_tensors(info)
            if not all(tensor.isfinite().all() for tensor in tensors.values()):
                return False  # told where the adapter is loaded, with the tensor's name
        if kind == "sidecar":
            settings = read_sidecar(folder / SIDECAR_FILE)
            head = make_head(settings.get("head", "prototypes"), settings)
            assert head.classify(*EPISODE).isfinite().all()
        files = adapter_files(info, "org/published")
    except LoRARecycleError:
        return False
    stated = read_license(folder)
    fields, sentence = inherited_license([stated])
    assert sentence and set(fields) <= {"license", "license_name"}
    for content in files.values():
        if isinstance(content, bytes):
            content.decode("utf-8")
    return True


def fuzz(folder: Path, kind: str, inputs: int, seed: int = 0, first: int = 0) -> int:
    """Try `inputs` inputs; how many were read."""
    sound, name = prepare(folder)[kind], {"card": CARD_FILE, "sidecar": SIDECAR_FILE, "codes": CODES_FILE}[kind]
    place, read = folder / "stranger", 0
    place.mkdir()
    for file, data in sound.items():
        (place / file).write_bytes(data)
    if kind == "sidecar":
        repair(place)
    assert attempt(place, kind)
    for number in range(first, first + inputs):
        (place / name).write_bytes(spoil(kind, sound[name], random.Random(f"{seed}/{number}")))
        if kind == "sidecar":
            repair(place)
        try:
            read += attempt(place, kind)
        except Exception as error:
            raise AssertionError(f"input {number} of seed {seed}: {type(error).__name__}: {error}") from error
    return read


@pytest.mark.parametrize("kind", ["card", "sidecar", "codes"])
def test_what_a_stranger_published_is_passed_on_or_refused(kind, tmp_path):
    assert 10 < fuzz(tmp_path, kind, 150) < 150  # both ways were walked


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("card", "sidecar", "codes"), required=True)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        print(fuzz(Path(scratch), arguments.kind, arguments.inputs, arguments.seed, arguments.first))
