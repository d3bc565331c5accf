"""Damaged and hostile surrogate data, sidecars and fitted tasks: each opens, or is refused with the library's error.

PYTHONPATH=tests:tests/hub python tests/surrogate/test_fuzz_data.py --inputs 10000
"""

import argparse
import contextlib
import functools
import json
import random
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from helpers_fuzz import respoil, spoil_bytes, spoil_config, spoil_header, spoil_numbers

from lora_recycle.errors import LoRARecycleError
from lora_recycle.fewshot.heads import make_head
from lora_recycle.hub.cards import surrogate_card
from lora_recycle.hub.upload import without_local_paths
from lora_recycle.modeling.sidecar import read_sidecar
from lora_recycle.modeling.task import FewShotTask, load_task, save_task
from lora_recycle.runtime.files import file_sha256
from lora_recycle.runtime.terminal import utf8
from lora_recycle.surrogate.dataset import MANIFEST, Shard, SurrogateDataset, save_shard, write_manifest
from lora_recycle.surrogate.table import told_apart


SIDECAR = "meta_lora_config.json"
#: One head for each kind of statistics, and the file that its task lies in here.
TASKS = {name: f"{name}.safetensors" for name in ("prototypes", "lda", "logistic_regression")}
PARAMETERS = {
    "transductive_em": {"scale": 5.0, "balance": [1.0, 2.0], "temperature": [1.0, 1.0]},
    "transductive_transport": {"entropy": 0.05, "passes": 2},
}


def prepare(folder: Path) -> dict[str, bytes]:
    """Sound surrogate data of two adapters, a sidecar and fitted tasks of three heads: path to content."""
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
    sidecar |= {"head": "transductive_em", "head_parameters": PARAMETERS}
    (folder / SIDECAR).write_text(json.dumps(sidecar))
    for name, file in TASKS.items():
        task = FewShotTask.fitted(torch.randn(6, 4, generator=generator), ["x", "y"] * 3, make_head(name, {}))
        save_task(folder / file, task)
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
        # an earlier change may have taken what this one looks for
        with contextlib.suppress(KeyError, TypeError, AttributeError):
            data = respoil(data, lambda data, how=how: how(data, rng))
    return data


def read_surrogate(folder: Path) -> None:
    data = SurrogateDataset.from_pretrained(folder)
    shards = [data.shard(i) for i in range(data.num_shards)]
    assert sum(len(shard) for shard in shards) >= 0 and data.sample(9) and without_local_paths(data.manifest)
    assert all(shard.label_names for shard in shards)
    assert all(shard.confidences.isfinite().all() and shard.accuracy <= 1 for shard in shards)
    assert len(set(told_apart([name for shard in shards for name in shard.label_names]))) >= 1
    assert utf8(surrogate_card("org/data", without_local_paths(data.manifest)))
    for number in range(data.num_shards):
        with contextlib.suppress(LoRARecycleError):  # not all checksums were repaired
            data.shard_rows(number, verify=True)


def repair(folder: Path) -> None:
    """The checksums of the manifest, as a hostile author would."""
    with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError, OSError):
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for entry in manifest["shards"]:
            entry["sha256"] = file_sha256(folder / entry["file"])
        (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


def read_settings(folder: Path) -> None:
    settings = read_sidecar(folder / SIDECAR)
    assert make_head(settings.get("head", "prototypes"), settings).classify(*EPISODE).isfinite().all()
    settings = read_sidecar(folder / SIDECAR, "transductive_transport")
    assert make_head("transductive_transport", settings).classify(*EPISODE).isfinite().all()


def read_task(folder: Path, name: str) -> None:
    head = make_head(name, {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # without its scatter the task is another head's
        task = load_task(folder / TASKS[name], head, 4)
    assert task is None or task.logits(EPISODE[0], head).isfinite().all()


EPISODE = (torch.eye(4)[:3], torch.tensor([0, 1, 1]), 2, torch.eye(4))
#: What reads a file; the surrogate data's where none is named.
READERS = {SIDECAR: read_settings} | {file: functools.partial(read_task, name=name) for name, file in TASKS.items()}


def attempt(folder: Path, names: Iterable[str]) -> list[str]:
    """Which of these files, or `surrogate`, are refused; exceptions that are not the library's go through."""
    refused = []
    for name in sorted({name if name in READERS else "surrogate" for name in names}):
        try:
            READERS.get(name, read_surrogate)(folder)
        except LoRARecycleError:
            refused.append(name)
    return refused


def fuzz(folder: Path, inputs: int, seed: int = 0, first: int = 0) -> dict[str, int]:
    """Try `inputs` inputs; number of files of each reader that it refused."""
    sound, refused = prepare(folder), dict.fromkeys(("surrogate", *READERS), 0)
    assert attempt(folder, sound) == []
    for number in range(first, first + inputs):
        rng = random.Random(f"{seed}/{number}")
        names = rng.sample(sorted(sound), rng.choice((1, 1, 2, 5)))
        for name in names:
            (folder / name).write_bytes(spoil(name, sound[name], rng))
        if rng.random() < 0.7:
            repair(folder)
        try:
            found = attempt(folder, names)
        except Exception as error:
            raise AssertionError(f"input {number} of seed {seed}: {type(error).__name__}: {error}") from error
        for name in found:
            refused[name] += 1
        for name in (*names, MANIFEST):
            (folder / name).write_bytes(sound[name])
    return refused


def test_damaged_surrogate_data_and_tasks_are_read_or_refused(tmp_path):
    refused = fuzz(tmp_path, 300)
    assert all(count > 10 for count in refused.values())  # all ways were walked


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        print(fuzz(Path(scratch), arguments.inputs, arguments.seed, arguments.first))
