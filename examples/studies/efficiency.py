"""What each speed-up of inversion and distillation costs in accuracy, and what it saves.

    python examples/studies/efficiency.py --data DATA --work runs/efficiency --json docs/results/efficiency.json

Each line of `VARIANTS` changes one thing. The surrogate images of 6 embedded cifar_fs adapters (10 classes, 2 images a
class) are distilled twice: from zero, where all that is gained comes from the images, and from the pool's average, as
the default does. Accuracy: 5-way, 600 episodes, on the validation and the test classes of cifar_fs, paired with the
reference named beside each line. Seconds are CPU seconds of one thread. DATA holds `cifar_fs/<split>.parquet`. Two
shells share the work with `--part 0 2` and `--part 1 2`; what is finished is kept in the work folder when it is run
again, and the JSON appears when the last variant is done. With `--only` and names of variants their lines in the JSON
are made anew, and the variants that they are compared with where the work folder lacks them; other lines stay.
"""

import argparse
import json
import os
import re
import time
from collections.abc import Iterable
from pathlib import Path

import common
import torch
from accelerate.state import AcceleratorState
from common import evaluate_network
from speed.trials import Lbfgs, Mixtures, PreviousBatch

from lora_recycle import AdapterPool, DistillationConfig, InversionConfig, LoRAInverter, MetaLoRATrainer
from lora_recycle.evaluation.results import confidence
from lora_recycle.fewshot.episodes import sample_episodes
from lora_recycle.hub.embedded import pool_path
from lora_recycle.images.labelled import load_labelled_images
from lora_recycle.runtime.files import atomic_write
from lora_recycle.surrogate.dataset import SurrogateDataset


ADAPTERS = [f"cifar_fs-{i:02d}" for i in (5, 8, 9, 10, 11, 12)]
BASE_INVERT = {**common.BASE_INVERT, "max_classes": 10, "iterations": 30}
BASE_DISTILL = {"rank": 16, "lr": 1e-3, "steps": 60, "relational_batch": 60, **common.FROM_INIT}
PLAIN = {"parameterization": "pixels", "lr": 0.25, "starts": {"noise": 1}, "flip": True}
#: whose images some variants start from: made by the base recipe, in time that no line counts
OTHERS = [f"cifar_fs-{i:02d}" for i in (0, 1, 2)]
OTHER_IMAGES = {"starts": {"images": 1}, "start_images": "others"}

#: name: (settings of inversion, settings of distillation) that differ from the base
VARIANTS = {
    "plain Adam, 2000 iterations": ({**PLAIN, "iterations": 2000}, {}),
    "multi-resolution, 30 iterations": ({}, {}),
    "plain Adam, 200 iterations": ({**PLAIN, "iterations": 200}, {}),
    "plain Adam, 30 iterations": ({**PLAIN, "iterations": 30}, {}),
    "multi-resolution, 100 iterations": ({"iterations": 100}, {}),
    "multi-resolution, 10 iterations": ({"iterations": 10}, {}),
    "multi-resolution, 0 iterations": ({"iterations": 0}, {}),
    "multi-resolution, stop at 0.9": ({"stop_at": 0.9, "iterations": 40}, {}),
    "multi-resolution, 30 iterations, bf16": ({}, {}),
    "pruned to 25% after layer 2": ({"prune": {2: 0.25}}, {}),
    "pruned to 25% after layer 1": ({"prune": {1: 0.25}}, {}),
    "masked 50%": ({"keep_ratio": 0.5}, {}),
    "masked 75%": ({"keep_ratio": 0.25}, {}),
    "masked 75%, pruned to 25% after layer 1": ({"prune": {1: 0.25}, "keep_ratio": 0.25}, {}),
    "meta-LoRA from layer 3 on": ({}, {"first_layer": 3}),
    "L-BFGS, 30 iterations": ({}, {}),
    "from the previous batch, 10 iterations": ({"iterations": 10}, {}),
    "from other adapters' images, 10 iterations": ({"iterations": 10, **OTHER_IMAGES}, {}),
    "from mixtures of two of them, 10 iterations": ({"iterations": 10, **OTHER_IMAGES}, {}),
    "from pale dead leaves, 15 iterations": ({"iterations": 15, "starts": {"pale-leaves": 1}}, {}),
    "from pale dead leaves, 10 iterations": ({"iterations": 10, "starts": {"pale-leaves": 1}}, {}),
}
#: what inverts, where the library has no setting for it
INVERTERS = {
    "L-BFGS, 30 iterations": Lbfgs,
    "from the previous batch, 10 iterations": PreviousBatch,
    "from mixtures of two of them, 10 iterations": Mixtures,
}
#: what each variant is compared with: the many iterations of the paper, or the same without its speed-up
REFERENCES = {"plain": "plain Adam, 2000 iterations", "multi": "plain Adam, 2000 iterations"}
BASE = "multi-resolution, 30 iterations"
SPLITS = ("validation", "test")


def run(name: str, pool: AdapterPool, folder: Path, sets, episodes) -> dict:
    """Invert, distil from zero and from the average, and judge: one variant's row."""
    invert, distill = VARIANTS[name]
    AcceleratorState._reset_state(reset_partial_state=True)  # else it keeps what the first variant was launched with
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if name.endswith("bf16") else "no"
    if "start_images" in invert:
        others = AdapterPool.from_pretrained([pool_path() / other for other in OTHERS])
        path = folder.parent / invert["start_images"]
        make_images(LoRAInverter(others, InversionConfig(**BASE_INVERT)), path)
        invert = {**invert, "start_images": str(path)}
    inverter = INVERTERS.get(name, LoRAInverter)(pool, InversionConfig(**{**BASE_INVERT, **invert}))
    surrogate, seconds, image_iterations = make_images(inverter, folder)
    shards = [surrogate.shard(i) for i in range(surrogate.num_shards)]
    images = sum(len(shard) for shard in shards)
    row = {
        "name": name,
        "image_iterations": image_iterations,
        "inversion_seconds": round(seconds, 1),
        "surrogate_accuracy": sum(shard.accuracy * len(shard) for shard in shards) / images,
        "surrogate_confidence": sum(shard.confidence * len(shard) for shard in shards) / images,
    }
    for init in ("zero", "average"):
        trainer = MetaLoRATrainer(
            pool, surrogate, DistillationConfig(validation_fraction=0.0, **{**BASE_DISTILL, **distill, "init": init})
        )
        started = time.process_time()
        student = trainer.train(progress=False)
        row[f"{init} seconds"] = round(time.process_time() - started, 1)
        for key, values in evaluate_network(student.backbone, sets, episodes).items():
            row[f"{init} {key}"] = values.tolist()
    return row


def make_images(inverter: LoRAInverter, folder: Path) -> tuple[SurrogateDataset, float, int]:
    """The surrogate images, the seconds that they took, and their iterations in all."""
    notes = folder / "inversion.json"
    if not notes.is_file():
        started, done = time.process_time(), []
        inverter.run(folder, progress=False, on_shard=lambda name, shard: done.append(inverter.image_iterations))
        atomic_write(notes, json.dumps([time.process_time() - started, sum(done)]).encode())
    return SurrogateDataset.from_pretrained(folder), *json.loads(notes.read_text())


def reference_of(name: str) -> str:
    """What a variant is compared with."""
    return REFERENCES.get(name.split()[0].split("-")[0], BASE)


def summary(rows: dict[str, dict], names: Iterable[str] | None = None) -> list[dict]:
    """Means with 95% intervals in place of the accuracies of single episodes, and paired differences.

    Args:
        names: the rows that are wanted; all by default, else `rows` may hold these and their references only.
    """
    found = []
    for name in rows if names is None else names:
        row, reference = rows[name], rows[reference_of(name)]
        found.append({k: v for k, v in row.items() if not isinstance(v, list)} | {"reference": reference["name"]})
        for key in [k for k, v in row.items() if isinstance(v, list)]:
            found[-1][key] = confidence(torch.tensor(row[key]))
            if key in reference:
                found[-1][f"delta {key}"] = confidence(torch.tensor(row[key]) - torch.tensor(reference[key]))
    return found


def untrained(pool: AdapterPool, sets, episodes) -> dict[str, dict]:
    """The frozen backbone and the pool's exact average on the same episodes."""
    found = {"frozen": evaluate_network(pool.backbone, sets, episodes)}
    with pool.folded() as averaged:
        found["average"] = evaluate_network(averaged, sets, episodes)
    return {n: {"name": n} | {f"average {k}": v.tolist() for k, v in r.items()} for n, r in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--part", nargs=2, type=int, default=(0, 1), metavar=("I", "N"), help="every N-th from I on")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, metavar="NAME", help="variants; default: all")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pool = AdapterPool.from_pretrained([pool_path() / name for name in ADAPTERS])
    size, resample = pool.backbone.image_size, int(pool.backbone.processor.resample)
    files = [args.data / "cifar_fs" / f"{split}.parquet" for split in SPLITS]
    sets = [load_labelled_images(file, size, resample, max_per_class=60) for file in files]
    episodes = {(d.name, k): sample_episodes(d.labels, 5, k, 15, 600, seed=1) for d in sets for k in (1, 5)}
    args.work.mkdir(parents=True, exist_ok=True)
    names = args.only or list(VARIANTS)
    needed = dict.fromkeys([*map(reference_of, names), *names])
    paths = {name: args.work / f"{re.sub('[^0-9a-z]+', '-', name.lower())}.json" for name in needed}
    first, parts = args.part
    for name, path in list(paths.items())[first::parts]:
        if not path.exists():
            row = run(name, pool, args.work / path.stem, sets, episodes)
            atomic_write(path, json.dumps(row).encode())
            means = {k: round(sum(v) / len(v), 2) if isinstance(v, list) else v for k, v in row.items()}
            print(json.dumps(means), flush=True)
    if all(path.exists() for path in paths.values()):
        rows = {name: json.loads(path.read_text()) for name, path in paths.items()}
        if args.only:
            lines = with_lines(json.loads(args.json.read_text()), summary(rows, names))
        else:
            lines = summary({**untrained(pool, sets, episodes), **rows})
        atomic_write(args.json, json.dumps(lines, indent=1).encode())


def with_lines(lines: list[dict], made: list[dict]) -> list[dict]:
    """Those that were made anew in the place of the old ones of their names; all in the order of `VARIANTS`."""
    by_name = {line["name"]: line for line in [*lines, *made]}
    order = [name for name in by_name if name not in VARIANTS] + [name for name in VARIANTS if name in by_name]
    return [by_name[name] for name in order]


if __name__ == "__main__":
    main()
