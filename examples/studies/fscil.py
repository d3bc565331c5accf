"""Class-incremental use on mini_imagenet: 60 base classes, then 8 sessions of 5 new classes with 5 images each.

    python examples/studies/fscil.py --data DATA --json docs/results/fscil.json

The usual protocol (TOPIC, arXiv 2004.10956) splits miniImageNet's 100 classes by their order; the pool here has
learned from classes of the published training split, so these are the base classes: 60 of the 64, drawn by the seed.
The new classes are the 36 of the validation and test splits in random order, which fill 7 sessions and one place of
the eighth, and the other 4 of the training split. Each draw of classes and images has its own seed. The base session
has all images that are no test images (15 of each class at the default --max-per-class 30), or 5.
"""

import argparse
import json
from pathlib import Path

import torch

from lora_recycle import AdapterPool, MetaLoRAForFewShotClassification
from lora_recycle.backbones.backbone import extract_features
from lora_recycle.evaluation.incremental import draw_sessions, session_accuracies
from lora_recycle.evaluation.results import confidence
from lora_recycle.fewshot.heads import make_head
from lora_recycle.hub.embedded import pool_path
from lora_recycle.images.labelled import load_labelled_images
from lora_recycle.runtime.files import atomic_write


HEADS = ("cosine_prototypes", "lda")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--pool", type=Path, default=pool_path())
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--max-per-class", type=int, default=30)
    parser.add_argument("--queries", type=int, default=15)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    model, pool = MetaLoRAForFewShotClassification.from_pretrained(args.model), AdapterPool.from_pretrained(args.pool)
    splits = ("train", "validation", "test")
    size, resample = model.backbone.image_size, int(model.backbone.processor.resample)
    parts = [
        load_labelled_images(args.data / "mini_imagenet" / f"{split}.parquet", size, resample, args.max_per_class)
        for split in splits
    ]
    pixels, first, labels, members = torch.cat([part.pixels for part in parts]), 0, [], []
    for part in parts:
        labels.append(part.labels + first)
        members.append(range(first, first + len(part.label_names)))
        first += len(part.label_names)
    labels, rows = torch.cat(labels), []
    features = {"frozen": extract_features(pool.backbone, pixels)}
    with pool.folded() as averaged:
        features["average"] = extract_features(averaged, pixels)
    features["meta-lora"] = extract_features(model.merge().backbone, pixels)
    for base_shots in (None, 5):
        draws = [
            draw_sessions(labels, classes_of(members, seed), queries=args.queries, base_shots=base_shots, seed=seed)
            for seed in range(args.draws)
        ]
        for method, found in features.items():
            for name in HEADS:
                judged = [session_accuracies(found, sessions, make_head(name, {})) for sessions in draws]
                rows.append({"method": method, "head": name, "base_images": base_shots or "all", **summary(judged)})
                print(json.dumps(rows[-1]), flush=True)
    settings = {"max_per_class": args.max_per_class, "queries": args.queries, "seeds": list(range(args.draws))}
    atomic_write(args.json, json.dumps({**settings, "rows": rows}, indent=1).encode())


def classes_of(members: list[range], seed: int) -> list[list[int]]:
    """Classes of the base session and of 8 sessions of 5."""
    generator = torch.Generator().manual_seed(seed)
    train = [members[0][i] for i in torch.randperm(len(members[0]), generator=generator).tolist()]
    unseen = [*members[1], *members[2]]
    unseen = [unseen[i] for i in torch.randperm(len(unseen), generator=generator).tolist()]
    new = (unseen + train[60:])[:40]
    return [train[:60], *(new[i : i + 5] for i in range(0, 40, 5))]


def summary(judged: list[dict[str, torch.Tensor]]) -> dict:
    """Means over the draws; the average over sessions and the drop (PD) with their 95% intervals over the draws."""
    every = torch.stack([one["all"] for one in judged])  # (draws, sessions)
    found = {"sessions": [round(value, 2) for value in every.mean(0).tolist()]}
    for name, values in (("average", every.mean(1)), ("drop", every[:, 0] - every[:, -1])):
        found[name], found[f"{name}_ci95"] = (round(number, 2) for number in confidence(values))
    for name in ("base", "new"):
        found[f"{name}_at_the_end"] = round(torch.stack([one[name][-1] for one in judged]).mean().item(), 2)
    return found


if __name__ == "__main__":
    main()
