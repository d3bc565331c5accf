"""Choose the settings of tuning on validation classes: what each gains over the same method untuned.

    python examples/studies/choose_tuning.py --data DATA --work runs/tuning --json docs/results/tuning.json
    python examples/studies/choose_tuning.py --data DATA --work runs/tuning --json docs/results/tuning_test.json \\
        --split test --variants default --episodes 100
    python examples/studies/choose_tuning.py --data DATA --work runs/tuning --method lora-linear \\
        --json runs/tuning/lora.json

5-way episodes of cifar_fs, mini_imagenet and vgg_flower, paired with the untuned method on the same episodes. Settings
are chosen on the validation split; `--split test` is there to look once at what was chosen. DATA holds
`<set>/<split>.parquet`. Cells that are finished under the same settings are kept in the work folder for the next run.
"""

import argparse
import json
import re
import time
from pathlib import Path

import torch

from lora_recycle import AdapterPool, MetaLoRAForFewShotClassification, TaskTuningConfig
from lora_recycle.evaluation.results import confidence
from lora_recycle.evaluation.tuned import MetaLoRATuning, tuned_accuracy
from lora_recycle.fewshot.episodes import EpisodeSet, sample_episodes
from lora_recycle.finetuning import TaskTuning, tuning_methods
from lora_recycle.hub.embedded import pool_path
from lora_recycle.images.labelled import LabelledImages, load_labelled_images
from lora_recycle.modeling.tuning import default_config
from lora_recycle.runtime.files import atomic_write


SETS = ("cifar_fs", "mini_imagenet", "vgg_flower")
#: Of each class; what episodes of 5 shots and 15 queries need, and half as many again.
MAX_IMAGES = 30

#: name: settings that differ from the method's own, given those
VARIANTS = {
    "untuned": lambda own: {"steps": 0, "last_layers": 0},
    "default": lambda own: {},
    "prototypes alone": lambda own: {**_free(own), "last_layers": 0, "steps": 20},
    "free prototypes": lambda own: _free(own),
    "no consistency": lambda own: {"consistency": 0.0},
    "a third of the step size": lambda own: {"lr": own["lr"] / 3},
    "two layers": lambda own: {"last_layers": 2},
    "twice the steps": lambda own: {"steps": own["steps"] * 2},
}


def _free(own: dict) -> dict:
    """Prototypes that learn from the images they were made of, which a sharper loss keeps from teaching much."""
    return {"leave_one_out": False, "temperature": 0.3 * own["temperature"]}


def make_method(name: str, model: MetaLoRAForFewShotClassification, variant: str) -> TaskTuning:
    """The method with the settings of a variant; `tune` stands for `model.tune`."""
    if name == "tune":
        own = default_config(model.head).to_dict()
        return MetaLoRATuning(model, TaskTuningConfig(**{**own, **VARIANTS[variant](own)}))
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


def cell(method: TaskTuning, pool: AdapterPool, data: LabelledImages, drawn: EpisodeSet, path: Path) -> dict:
    """What `judge` found, now or in an earlier run under the same settings."""
    settings = method.config.to_dict()
    if path.is_file():
        found = json.loads(path.read_text())
        if found["settings"] == settings:
            return found
    found = {**judge(method, pool, data, drawn), "settings": settings}
    atomic_write(path, json.dumps(found).encode())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--method", default="tune", choices=("tune", *tuning_methods()))
    parser.add_argument("--split", default="validation", choices=("validation", "test"))
    parser.add_argument("--episodes", type=int, default=60, metavar="N", help="of each set and number of shots")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="NAME")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = MetaLoRAForFewShotClassification.from_pretrained("demo")
    pool = AdapterPool.from_pretrained(pool_path())
    size, resample = model.backbone.image_size, int(model.backbone.processor.resample)
    paths = [args.data / name / f"{args.split}.parquet" for name in SETS]
    sets = [load_labelled_images(path, size, resample, MAX_IMAGES) for path in paths]
    cells = {}
    for name in dict.fromkeys(["untuned", *args.variants]):
        method = make_method(args.method, model, name)
        for data in sets:
            for shots in (1, 5):
                slug = re.sub("[^0-9a-z]+", "-", f"{args.method} {name} {data.name} {shots} {args.episodes}".lower())
                drawn = sample_episodes(data.labels, 5, shots, 15, args.episodes, seed=1)
                cells[name, data.name, shots] = cell(method, pool, data, drawn, args.work / f"{slug}.json")
        gains = {k: [round(x, 2) for x in v] for k, v in table(cells)[name].items() if isinstance(v, tuple)}
        print(json.dumps({name: gains}), flush=True)
    atomic_write(args.json, json.dumps(table(cells), indent=1).encode())


if __name__ == "__main__":
    main()
