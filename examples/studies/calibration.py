"""Do probabilities mean what they say: expected calibration error before and after the temperature of `fit`.

    python examples/studies/calibration.py --data DATA --json docs/results/calibration.json

Tasks of 5 ways with 1, 2 and 5 shots, 100 episodes, seed 0, 15 queries a class, at most 20 images of each class; the
shared network of the meta-LoRA, prototypes by cosine. Before: the head's own temperature. After: that of
`fewshot.calibration.support_factor`. Its three constants are those of the least cross-entropy on episodes of
validation classes; the table is of test classes. Answers, and so accuracies, are the same before and after.
"""

import argparse
import itertools
import json
from pathlib import Path

import torch
import torch.nn.functional as F

from lora_recycle import MetaLoRAForFewShotClassification
from lora_recycle.backbones.backbone import extract_features
from lora_recycle.evaluation.rejection import expected_calibration_error
from lora_recycle.evaluation.results import confidence
from lora_recycle.fewshot.calibration import FACTORS, best_factor, leave_one_out, support_factor
from lora_recycle.fewshot.episodes import sample_episodes
from lora_recycle.images.labelled import load_labelled_images
from lora_recycle.runtime.files import atomic_write


SETS = ("cifar_fs", "mini_imagenet", "vgg_flower")
WAYS, SHOTS, QUERIES = 5, (1, 2, 5), 15
#: What EXPECTED_FACTOR and SPREAD are chosen among.
EXPECTED, SPREADS = (2**-0.5, 1.0, 2**0.5), (0.25, 0.5, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--max-per-class", type=int, default=20)
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    model = MetaLoRAForFewShotClassification.from_pretrained(args.model)
    validation = [task for name in SETS for task in tasks(model, args, name, "validation")]
    chosen = choose(validation, model.head)
    print(json.dumps(chosen, indent=1))
    rows = [row for name in SETS for row in rows_of(tasks(model, args, name, "test"), model.head, f"{name}/test")]
    about = {"seed": 0, "episodes": args.episodes, "max_per_class": args.max_per_class, "validation": chosen}
    atomic_write(args.json, json.dumps({**about, "rows": rows}, indent=1, allow_nan=False).encode())
    for row in rows:
        print(*row.values(), sep="\t")


def tasks(model, args, name: str, split: str) -> list[dict]:
    """Support, its labels, and the scores and labels of the queries, of each episode."""
    size, resample = model.backbone.image_size, int(model.backbone.processor.resample)
    data = load_labelled_images(args.data / name / f"{split}.parquet", size, resample, args.max_per_class)
    features, found = extract_features(model.backbone, data.pixels), []
    for shots in SHOTS:
        way = torch.arange(WAYS).repeat_interleave(shots)
        for episode in sample_episodes(data.labels, WAYS, shots, QUERIES, args.episodes, 0):
            support = features[episode.support].flatten(0, 1)
            scores = model.head.classify(support, way, WAYS, features[episode.query])
            found.append(
                {"shots": shots, "support": support, "way": way, "scores": scores, "labels": episode.query_labels}
            )
    return found


def loss(task: dict, factor: float) -> float:
    return F.cross_entropy(task["scores"] / factor, task["labels"]).item()


def choose(every: list[dict], head) -> dict[str, float]:
    """The three constants, by mean cross-entropy of the queries."""
    single = [task for task in every if task["shots"] == 1]
    several = [(task, leave_one_out(head, task["support"], task["way"], WAYS)) for task in every if task["shots"] > 1]
    one_shot = min(FACTORS, key=lambda factor: sum(loss(task, factor) for task in single))

    def of_prior(prior: tuple[float, float]) -> float:
        return sum(loss(task, best_factor(scores, task["way"], *prior)) for task, scores in several)

    expected, spread = min(itertools.product(EXPECTED, SPREADS), key=of_prior)
    return {"ONE_SHOT_FACTOR": one_shot, "EXPECTED_FACTOR": expected, "SPREAD": spread}


def rows_of(every: list[dict], head, name: str) -> list[dict]:
    """For each number of shots: accuracy with its interval, calibration errors, the median factor."""
    rows = []
    for shots in SHOTS:
        own = [task for task in every if task["shots"] == shots]
        factors = [support_factor(head, task["support"], task["way"], WAYS) for task in own]
        right = [task["scores"].argmax(1) == task["labels"] for task in own]
        mean, half = confidence(torch.stack([100 * each.float().mean() for each in right]))
        rows.append(
            {
                "data": name,
                "shots": shots,
                "accuracy": round(mean, 2),
                "ci95": round(half, 2),
                "ece_before": round(error(own, right, [1.0] * len(own)), 2),
                "ece_after": round(error(own, right, factors), 2),
                "loss_before": round(sum(loss(task, 1.0) for task in own) / len(own), 4),
                "loss_after": round(sum(map(loss, own, factors)) / len(own), 4),
                "median_factor": round(torch.tensor(factors).median().item(), 3),
            }
        )
    return rows


def error(every: list[dict], right: list[torch.Tensor], factors: list[float]) -> float:
    sure = [(task["scores"] / factor).softmax(1).amax(1) for task, factor in zip(every, factors, strict=True)]
    return expected_calibration_error(torch.cat(sure), torch.cat(right))


if __name__ == "__main__":
    main()
