"""Damaged and hostile surrogate data, sidecars and fitted tasks: each opens, or is refused with the library's error.

PYTHONPATH=tests:tests/hub python tests/hub/test_fuzz_data.py --inputs 10000
"""

import argparse
import contextlib
import json
import random
import tempfile
from pathlib import Path

import torch
from test_fuzz import respoil, spoil_bytes, spoil_config, spoil_header, spoil_numbers

from lora_recycle.errors import LoraRecycleError
from lora_recycle.hub.publish import without_local_paths
from lora_recycle.modeling.sidecar import read_sidecar, read_task
from lora_recycle.storage import atomic_save_tensors
from lora_recycle.surrogate import Shard, SurrogateDataset, save_shard, write_manifest


MANIFEST, SIDECAR, TASK = "manifest.json", "meta_lora_config.json", "few_shot_task.safetensors"


def prepare(folder: Path) -> dict[str, bytes]:
    """Sound surrogate data of two adapters, a sidecar and a fitted task: path to content."""
    generator, files = torch.Generator().manual_seed(0), []
    for i, labels in enumerate((["a", "b", "c"], None)):
        adapter = {"name": f"org/{i}", "revision": None, "sha256": f"{i}" * 64, "labels": labels, "num_classes": 3}
        pixels = torch.randint(0, 256, (6, 3, 8, 8), generator=generator, dtype=torch.uint8)
        shard = Shard(adapter, pixels, torch.arange(6) % 3, torch.randn(6, 3), torch.randn(6, 4).half())
        shard.kept_tokens = torch.zeros(6, 2, dtype=torch.int16) if i else None
        files.append(folder / "shards" / f"{i}.safetensors")
        save_shard(files[-1], shard, "id")
    write_manifest(folder, {"config": {"starts": {"noise": 1.0}}, "backbone": {"name": "org/base"}}, files)
    sidecar = {"metric": "cosine", "temperature": 0.1, "num_classes": 2, "sources": [{"name": "org/0"}]}
    (folder / SIDECAR).write_text(json.dumps(sidecar))
    tensors = {"sums": torch.ones(2, 4), "counts": torch.ones(2)}
    atomic_save_tensors(folder / TASK, tensors, json.dumps({"label_names": ["x", "y"]}))
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def spoil_metadata(data: bytes, rng: random.Random) -> bytes:
    """One place of the JSON that the one entry of the file's metadata holds."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    inner = spoil_config(header["__metadata__"]["header"].encode(), rng).decode()
    text = json.dumps(header | {"__metadata__": {"header": inner}}).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def spoil(name: str, data: bytes, rng: random.Random) -> bytes:
    """One file, one to three times spoilt."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        if name.endswith(".json"):
            how = rng.choice((spoil_bytes, spoil_config, spoil_config))
        else:
            how = rng.choice((spoil_bytes, spoil_header, spoil_metadata, spoil_numbers))
        with contextlib.suppress(KeyError, TypeError, AttributeError):  # an earlier change took what this one spoils
            data = respoil(data, lambda data, how=how: how(data, rng))
    return data


def attempt(folder: Path) -> int:
    """How many of the readers take what lies in `folder`; exceptions that are not the library's go through."""
    taken = 0

    def surrogate():
        data = SurrogateDataset.from_pretrained(folder)
        shards = [data.shard(i) for i in range(data.num_shards)]
        assert sum(len(shard) for shard in shards) >= 0 and data.sample(9) and without_local_paths(data.manifest)
        assert all(shard.label_names for shard in shards)

    for read in (surrogate, lambda: read_sidecar(folder / SIDECAR), lambda: read_task(folder / TASK, 4)):
        with contextlib.suppress(LoraRecycleError):
            read()
            taken += 1
    return taken


def fuzz(folder: Path, inputs: int, seed: int = 0, first: int = 0) -> dict[int, int]:
    """Try `inputs` inputs; number of readers that took all they read -> how often."""
    sound, counts = prepare(folder), dict.fromkeys(range(4), 0)
    assert attempt(folder) == 3
    for number in range(first, first + inputs):
        rng = random.Random(f"{seed}/{number}")
        names = rng.sample(sorted(sound), rng.choice((1, 1, 2, 5)))
        for name in names:
            (folder / name).write_bytes(spoil(name, sound[name], rng))
        try:
            counts[attempt(folder)] += 1
        except Exception as error:
            raise AssertionError(f"input {number} of seed {seed}: {type(error).__name__}: {error}") from error
        for name in names:
            (folder / name).write_bytes(sound[name])
    return counts


def test_damaged_surrogate_data_and_tasks_are_read_or_refused(tmp_path):
    counts = fuzz(tmp_path, 250)
    assert all(count > 10 for count in counts.values())  # all ways were walked


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        print(fuzz(Path(scratch), arguments.inputs, arguments.seed, arguments.first))
