"""Choose the settings of tuning on validation classes: what each gains over the same method untuned.

    python examples/choose_tuning.py --data DATA --work runs/tuning --json docs/results/tuning.json
    python examples/choose_tuning.py --data DATA --work runs/tuning --json runs/tuning/lora.json --method lora-linear

5-way episodes of the validation splits of cifar_fs, mini_imagenet and vgg_flower and of the 33 characters of
omniglot_small that the shipped pool leaves out, paired with the untuned method on the same episodes. No test class is
read. DATA holds `<set>/<split>.parquet`. Finished cells are kept in the work folder when it is run again.
"""

import argparse
import json
import re
import time
from pathlib import Path

import torch
from choose_recipe import validation_sets

from lora_recycle import AdapterPool, MetaLoRAForFewShotClassification, TaskTuningConfig
from lora_recycle.embedded import pool_path
from lora_recycle.evaluation.episodes import EpisodeSet, sample_episodes
from lora_recycle.evaluation.protocol import confidence
from lora_recycle.evaluation.tuned import tuned_accuracy
from lora_recycle.images import LabelledImages
from lora_recycle.modeling.tuning_task import MetaLoraTuning, default_config
from lora_recycle.storage import atomic_write
from lora_recycle.task_tuning import TaskTuning, tuning_methods


#: name: settings that differ from the method's own, given those
VARIANTS = {
    "untuned": lambda own: {"steps": 0, "last_layers": 0},
    "class centres alone": lambda own: {"last_layers": 0},
    "default": lambda own: {},
    "no consistency": lambda own: {"consistency": 0.0},
    "temperature of the head": lambda own: {"temperature": 0.1},
    "network alone": lambda own: {"head_lr": 0.0},
    "a third of the step size": lambda own: {"lr": own["lr"] / 3},
    "three times the step size": lambda own: {"lr": own["lr"] * 3},
    "twice the steps": lambda own: {"steps": own["steps"] * 2},
    "all layers": lambda own: {"last_layers": None},
}


def make_method(name: str, model: MetaLoRAForFewShotClassification, variant: str) -> TaskTuning:
    """The method with the settings of a variant; `tune` stands for `model.tune`."""
    if name == "tune":
        own = default_config(model).to_dict()
        return MetaLoraTuning(model, TaskTuningConfig(**{**own, **VARIANTS[variant](own)}))
    kind = type(tuning_methods()[name])
    own = TaskTuningConfig(**kind.defaults).to_dict()
    return kind(TaskTuningConfig(**{**own, **VARIANTS[variant](own)}))


def judge(method: TaskTuning, pool: AdapterPool, data: LabelledImages, drawn: EpisodeSet) -> dict:
    """Per-episode accuracies, and seconds for each task."""
    started = time.perf_counter()
    accuracies, _ = tuned_accuracy(method, pool, data.pixels, drawn)
    return {"accuracies": accuracies.tolist(), "seconds": (time.perf_counter() - started) / len(drawn)}


def table(cells: dict[tuple[str, str, int], dict]) -> dict[str, dict]:
    """Per variant: paired gain over the untuned model with its 95% interval by "<set> <shots>", and over all sets."""
    found: dict[str, dict] = {}
    for variant in dict.fromkeys(name for name, _, _ in cells):
        gains: dict[int, list[torch.Tensor]] = {}
        row = found.setdefault(variant, {})
        for (name, data, shots), cell in cells.items():
            if name == variant:
                untuned = torch.tensor(cells["untuned", data, shots]["accuracies"])
                gains.setdefault(shots, []).append(torch.tensor(cell["accuracies"]) - untuned)
                row[f"{data} {shots}"] = confidence(gains[shots][-1])
        for shots, values in gains.items():
            row[f"all {shots}"] = confidence(torch.cat(values))
            of_shots = [cell["seconds"] for (name, _, k), cell in cells.items() if (name, k) == (variant, shots)]
            row[f"seconds {shots}"] = sum(of_shots) / len(of_shots)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--method", default="tune", choices=("tune", *tuning_methods()))
    parser.add_argument("--episodes", type=int, nargs=2, default=(100, 50), metavar="N", help="1-shot and 5-shot")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="NAME")
    args = parser.parse_args()
    model = MetaLoRAForFewShotClassification.from_pretrained("demo")
    pool = AdapterPool.from_pretrained(pool_path())
    sets = validation_sets(args.data, model.backbone.image_size, int(model.backbone.processor.resample))
    cells = {}
    for name in dict.fromkeys(["untuned", *args.variants]):
        method = make_method(args.method, model, name)
        for data in sets:
            for shots, count in zip((1, 5), args.episodes, strict=True):
                slug = re.sub("[^0-9a-z]+", "-", f"{args.method} {name} {data.name} {shots} {count}".lower())
                path = args.work / f"{slug}.json"
                if not path.is_file():
                    drawn = sample_episodes(data.labels, 5, shots, 15, count, seed=1)
                    atomic_write(path, json.dumps(judge(method, pool, data, drawn)).encode())
                cells[name, data.name, shots] = json.loads(path.read_text())
        gains = {k: [round(x, 2) for x in v] for k, v in table(cells)[name].items() if isinstance(v, tuple)}
        print(json.dumps({name: gains}), flush=True)
    atomic_write(args.json, json.dumps(table(cells), indent=1).encode())


if __name__ == "__main__":
    main()
