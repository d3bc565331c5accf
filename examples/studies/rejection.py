"""What belongs to no class: AUROC of unseen classes and calibration of the confidence, on test episodes.

    python examples/studies/rejection.py --data DATA --surrogate runs/surrogate --json docs/results/rejection.json

Tasks of 5 ways whose queries are half from 5 other classes; 600 episodes, seed 0, 15 queries a class, at most 20
images of each class; prototypes by cosine. Calibration (ECE) is of the queries that belong to a class.
Temperatures: 0.1, the default; `surrogate`, what `fit_head` learns on surrogate episodes of 1 shot;
`validation`, learned on episodes of validation classes, which shows what is to be had. The surrogate
images are those of docs/embedded.md.
"""

import argparse
import json
from pathlib import Path

import torch
from sklearn.metrics import roc_auc_score

from lora_recycle import AdapterPool, MetaLoRAForFewShotClassification, SurrogateDataset, fit_head
from lora_recycle.backbones.backbone import Backbone, extract_features
from lora_recycle.evaluation.rejection import (
    SCORES,
    expected_calibration_error,
    fit_temperature,
    known_scores,
    open_tasks,
)
from lora_recycle.evaluation.results import confidence
from lora_recycle.fewshot.episodes import sample_episodes
from lora_recycle.hub.embedded import pool_path
from lora_recycle.images.labelled import LabelledImages, load_labelled_images
from lora_recycle.runtime.files import atomic_write


TEST = ("cifar_fs", "mini_imagenet", "vgg_flower")
DEFAULT = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--pool", type=Path, default=pool_path())
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--surrogate", type=Path, required=True)
    parser.add_argument("--max-per-class", type=int, default=20)
    parser.add_argument("--episodes", type=int, default=600)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    model, pool = MetaLoRAForFewShotClassification.from_pretrained(args.model), AdapterPool.from_pretrained(args.pool)
    size, resample = model.backbone.image_size, int(model.backbone.processor.resample)
    names = [(name, "test") for name in TEST] + [(name, "validation") for name in TEST]
    sets = {
        key: load_labelled_images(args.data / key[0] / f"{key[1]}.parquet", size, resample, args.max_per_class)
        for key in names
    }
    features = {"frozen": embed(pool.backbone, sets)}
    with pool.folded() as averaged:
        features["average"] = embed(averaged, sets)
    features["meta-lora"] = embed(model.backbone, sets)
    fitted, rows = fit_head(model, SurrogateDataset.from_pretrained(args.surrogate)).temperature, []
    for shots in (1, 5):
        drawn = {key: sample_episodes(data.labels, 10, shots, 15, args.episodes, 0) for key, data in sets.items()}
        for method, found in features.items():
            seen = [task for name in TEST for task in open_tasks(found[name, "validation"], drawn[name, "validation"])]
            temperatures = {"default": DEFAULT, "surrogate": fitted, "validation": fit_temperature(seen)}
            for name in TEST:
                tasks = open_tasks(found[name, "test"], drawn[name, "test"])
                rows.append({"method": method, "data": f"{name}/test", "shots": shots, **judge(tasks, temperatures)})
                print(json.dumps(rows[-1]), flush=True)
    settings = {"seed": 0, "episodes": args.episodes, "max_per_class": args.max_per_class}
    atomic_write(args.json, json.dumps({**settings, "rows": rows}, indent=1).encode())


def embed(network: Backbone, sets: dict[tuple[str, str], LabelledImages]) -> dict[tuple[str, str], torch.Tensor]:
    return {key: extract_features(network, data.pixels) for key, data in sets.items()}


def judge(tasks, temperatures: dict[str, float]) -> dict:
    """AUROC with its 95% interval by score, at the default temperature; ECE by temperature; accuracy without
    strangers."""
    found = {"auroc": {}, "ece": {}, "temperature": {name: round(t, 4) for name, t in temperatures.items()}}
    for score in SCORES:
        values = []
        for task in tasks:
            scores, known = known_scores(task.logits, score, DEFAULT), len(task.labels)
            values.append(100 * roc_auc_score([1] * known + [0] * (len(scores) - known), scores.numpy()))
        found["auroc"][score] = [round(number, 2) for number in confidence(torch.tensor(values))]
    logits = torch.cat([task.logits[: len(task.labels)] for task in tasks])
    correct = logits.argmax(1) == torch.cat([task.labels for task in tasks])
    for name, temperature in temperatures.items():
        sure = known_scores(logits, "max_softmax", temperature)
        found["ece"][name] = round(expected_calibration_error(sure, correct), 2)
    return {**found, "accuracy": round(100 * correct.double().mean().item(), 2)}


if __name__ == "__main__":
    main()
