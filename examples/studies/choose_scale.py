"""Choose the scale of each merge on validation classes: what it gains over the frozen backbone at every scale.

    python examples/studies/choose_scale.py --data DATA --pools mixed --json docs/results/choose_scale.json

The shipped pool on validation classes of all four data sets (`mixed`), and its adapters of one data set on those of
the same (`in-domain`).
DATA holds `<set>/validation.parquet` of cifar_fs, mini_imagenet and vgg_flower, and `omniglot_small/train.parquet`, of
which the characters that no adapter saw are used. No test class is read. Rows that the JSON file holds already are not
made again.
"""

import argparse
import json
from pathlib import Path

import torch
from common import validation_sets

from lora_recycle import AdapterPool
from lora_recycle.adapters.adapter import Adapter
from lora_recycle.backbones.backbone import Backbone, extract_features
from lora_recycle.evaluation.results import confidence
from lora_recycle.fewshot.accuracy import prototype_accuracy
from lora_recycle.fewshot.episodes import sample_episodes
from lora_recycle.hub.embedded import pool_path
from lora_recycle.images.labelled import LabelledImages
from lora_recycle.merging import Dare, Knots, Merge, Ties
from lora_recycle.runtime.files import atomic_write


#: The average is the merge that is scaled in task arithmetic. 1 is left out where another scale is better by far.
SCALES = {
    "ties": (0.15, 0.3, 0.5),
    "knots": (0.3, 0.5, 0.7),
    "average": (1.0, 1.5, 2.0, 3.0),
    "dare": (2.0, 3.0),
}
#: 5 for the support and 15 for the queries
IMAGES_PER_CLASS = 20


def merged(name: str, pool: AdapterPool) -> Adapter | None:
    """The merge, made once for all scales. None: the exact average, which the pool folds itself."""
    kinds: dict[str, type[Merge]] = {"dare": Dare, "ties": Ties, "knots": Knots}
    return kinds[name](scale=1.0).merge(pool) if name in kinds else None


def gains(
    backbone: Backbone, data: LabelledImages, episodes: dict, frozen: dict[int, torch.Tensor]
) -> dict[str, tuple[float, float]]:
    """Paired gains by "<set> <shots>", each with its 95% interval."""
    features = extract_features(backbone, data.pixels)
    return {
        f"{data.name} {shots}": confidence(prototype_accuracy(features, drawn) - frozen[shots])
        for shots, drawn in episodes.items()
    }


def chosen(rows: list[dict]) -> dict[str, float]:
    """Of each method the scale with the highest mean gain over all columns of its rows."""
    means: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        means.setdefault(row["method"], {}).setdefault(row["scale"], []).extend(v[0] for v in row["gains"].values())
    return {name: max(own, key=lambda s, o=own: sum(o[s]) / len(o[s])) for name, own in means.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--pools", nargs="+", default=["mixed", "in-domain"], choices=("mixed", "in-domain"))
    parser.add_argument("--episodes", type=int, default=600, metavar="N", help="of each set and number of shots")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pool = AdapterPool.from_pretrained(pool_path())
    size, resample = pool.backbone.image_size, int(pool.backbone.processor.resample)
    sets = validation_sets(args.data, size, resample, IMAGES_PER_CLASS)
    drawn = [{k: sample_episodes(data.labels, 5, k, 15, args.episodes, seed=1) for k in (1, 5)} for data in sets]
    frozen = []
    for data, episodes in zip(sets, drawn, strict=True):
        features = extract_features(pool.backbone, data.pixels)
        frozen.append({k: prototype_accuracy(features, own) for k, own in episodes.items()})
    known = json.loads(args.json.read_text()) if args.json.is_file() else {}
    found = {kind: known.get(kind, []) for kind in args.pools}
    for kind, rows in found.items():
        pools = [_own(pool, data.name) for data in sets] if kind == "in-domain" else [pool] * len(sets)
        for method, scales in SCALES.items():
            missing = [scale for scale in scales if (method, scale) not in {(r["method"], r["scale"]) for r in rows}]
            adapters = {id(own): merged(method, own) for own in pools} if missing else {}
            for scale in missing:
                row = {"method": method, "scale": scale, "gains": {}}
                for i, data in enumerate(sets):
                    adapter = adapters[id(pools[i])]
                    with pools[i].folded(None if adapter is None else [adapter], scale) as backbone:
                        row["gains"] |= gains(backbone, data, drawn[i], frozen[i])
                rows.append(row)
                print(kind, json.dumps(row), flush=True)
                result = {**found, "chosen": {name: chosen(own) for name, own in found.items()}}
                atomic_write(args.json, json.dumps(result, indent=1).encode())


def _own(pool: AdapterPool, name: str) -> AdapterPool:
    """The adapters of the data set that `name`, "<set>/<split>", is of."""
    return pool.subset([i for i, info in enumerate(pool.infos) if info.name.startswith(name.partition("/")[0])])


if __name__ == "__main__":
    main()
