"""What the tests of cifar_fs owe to images and a class that adapters of the shipped pool were tuned on.

    python examples/studies/overlap.py --data DATA --json docs/results/overlap.json

Finds the images of `cifar_fs/test.parquet` that are also in `cifar_fs/train.parquet`, pixel by pixel, and compares the
accuracies on all test images with those without them and without `rose`, a class of one adapter of vgg_flower. The
episodes differ, so the intervals are not paired; the gains over the frozen backbone are. DATA holds
`cifar_fs/<split>.parquet`.
"""

import argparse
import hashlib
import json
from pathlib import Path

import torch

from lora_recycle import AdapterPool, MetaLoRAForFewShotClassification
from lora_recycle.backbones.backbone import extract_features
from lora_recycle.evaluation.results import confidence
from lora_recycle.fewshot.accuracy import prototype_accuracy
from lora_recycle.fewshot.episodes import sample_episodes
from lora_recycle.hub.embedded import pool_path
from lora_recycle.images.decode import decoded
from lora_recycle.images.labelled import load_labelled_images
from lora_recycle.images.sources import open_source
from lora_recycle.runtime.files import atomic_write


KNOWN_CLASS = "rose"


def digests(path: Path) -> list[str]:
    """One for the pixels of each image."""
    source = open_source(path)

    def digest(image) -> str:
        return hashlib.sha256(str(image.size).encode() + image.tobytes()).hexdigest()

    return list(decoded(source.fetch(list(range(len(source)))), digest))


def shared(test: Path, train: Path) -> list[int]:
    """Numbers of the images of `test` that are also in `train`."""
    known = set(digests(train))
    return [number for number, digest in enumerate(digests(test)) if digest in known]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--episodes", type=int, default=600)
    args = parser.parse_args()
    torch.set_num_threads(1)
    test, train = (args.data / "cifar_fs" / f"{split}.parquet" for split in ("test", "train"))
    twice = shared(test, train)
    pool, model = AdapterPool.from_pretrained(pool_path()), MetaLoRAForFewShotClassification.from_pretrained("demo")
    size, resample = pool.backbone.image_size, int(pool.backbone.processor.resample)
    found: dict = {"images": twice, "class": KNOWN_CLASS, "rows": []}
    for name, left_out in (("all", {}), ("left out", {"without_classes": [KNOWN_CLASS], "without_images": twice})):
        data = load_labelled_images(test, size, resample, 40, **left_out)
        features = {"frozen": extract_features(pool.backbone, data.pixels)}
        with pool.folded() as averaged:
            features["average"] = extract_features(averaged, data.pixels)
        features["meta-lora"] = extract_features(model.backbone, data.pixels)
        for shots in (1, 5):
            drawn = sample_episodes(data.labels, 5, shots, 15, args.episodes, 0)
            accuracies = {method: prototype_accuracy(own, drawn) for method, own in features.items()}
            row = {"images": name, "shots": shots, "frozen": confidence(accuracies["frozen"])}
            row |= {m: confidence(accuracies[m] - accuracies["frozen"]) for m in ("average", "meta-lora")}
            found["rows"].append(row)
            print(json.dumps(row), flush=True)
    atomic_write(args.json, json.dumps(found, indent=1).encode())


if __name__ == "__main__":
    main()
