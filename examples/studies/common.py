"""What the studies share: their recorded settings, the validation classes that choices are made on, and accuracies.

A part of the studies that runs nothing by itself.
"""

from pathlib import Path

import torch

from lora_recycle import AdapterPool
from lora_recycle.backbones.backbone import extract_features
from lora_recycle.fewshot.accuracy import prototype_accuracy
from lora_recycle.images.labelled import LabelledImages, load_labelled_images
from lora_recycle.merging.base import Changes, Merge, add_scaled


#: classes at the end of a training split that no adapter sees, kept for validation where a set has no such split
HELD_BACK = {"omniglot_small": 33}
BASE_INVERT = {
    "images_per_class": 2,
    "max_classes": 8,
    "iterations": 20,
    "starts": {"dead-leaves": 1},
    "stop_at": 1.0,
    "keep_ratio": 1.0,
}
#: Learning as the recorded studies have it: from `init`, all of it kept, in a loss in which groups count the same.
FROM_INIT = {"share": 1.0, "balance": "groups"}
BASE_DISTILL = {"rank": 16, "lr": 1e-3, "steps": 60, "relational_batch": 64, "init": "average", **FROM_INIT}


def validation_sets(data: Path, size: int, resample: int, each: int = 50) -> list[LabelledImages]:
    sets = [
        load_labelled_images(data / name / "validation.parquet", size, resample, max_per_class=each)
        for name in ("cifar_fs", "mini_imagenet", "vgg_flower")
    ]
    train = load_labelled_images(data / "omniglot_small" / "train.parquet", size, resample)
    names, first = train.label_names, len(train.label_names) - HELD_BACK["omniglot_small"]
    held = train.labels >= first
    return [
        *sets,
        LabelledImages(train.pixels[held], train.labels[held] - first, names[first:], "omniglot_small/held"),
    ]


def evaluate_network(network, sets, episodes) -> dict[str, torch.Tensor]:
    """Per-episode accuracy by "<set> <shots>"."""
    accuracies = {}
    for data in sets:
        features = extract_features(network, data.pixels)
        for shots in (1, 5):
            accuracies[f"{data.name} {shots}"] = prototype_accuracy(features, episodes[data.name, shots])
    return accuracies


class Weighted(Merge):
    """The groups' averages, each times a factor of its own, the small ones cut to a rank."""

    def __init__(self, averages: list[Changes], factors: tuple[float, ...], rank: int | None):
        self.averages, self.factors, self.rank = averages, factors, rank

    def changes(self, pool: AdapterPool) -> Changes:
        total: Changes = {}
        for i, (average, factor) in enumerate(zip(self.averages, self.factors, strict=True)):
            add_scaled(total, cut(average, self.rank) if i and self.rank else average, factor)
        return total


def cut(changes: Changes, rank: int) -> Changes:
    """Each matrix's best approximation of that rank (truncated SVD)."""
    found = {}
    for name, change in changes.items():
        if change.ndim == 2:
            u, s, v = torch.linalg.svd(change, full_matrices=False)
            change = (u[:, :rank] * s[:rank]) @ v[:rank]
        found[name] = change
    return found
