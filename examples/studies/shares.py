"""What share of the learnt to keep, and beside which merge: blends, judged on validation classes.

    lora-recycle invert demo --output runs/surrogate
    lora-recycle distill demo --surrogate runs/surrogate --init group-sum --share 1 --validation-fraction 0 \
        --output runs/learnt
    python examples/studies/shares.py --data DATA --json docs/results/shares.json \
        --pool "shipped, 40" demo runs/learnt \
        --pool "mixed, 100" runs/pool100 runs/pool100-learnt \
        --pool "second backbone" runs/second-pool runs/second-learnt

A pool is a name, its adapters, and what was learnt from them from the sum of their groups' averages on; those of the
second and third are made by the recipes in `benchmark-recipes/`. Each mix is cut to rank 64 and evaluated on
2,000 5-way episodes on the validation splits of cifar_fs, mini_imagenet and vgg_flower and on the 33 characters that
no adapter saw, at most 50 images a class, paired with the pool's exact average. DATA holds `<set>/<split>.parquet`.
No test class is read. A quarter of an hour on one core, most of it the second backbone.
"""

import argparse
import json
from pathlib import Path

from common import Weighted, cut, evaluate_network, validation_sets

from lora_recycle import AdapterPool
from lora_recycle.evaluation.results import confidence
from lora_recycle.fewshot.episodes import sample_episodes
from lora_recycle.hub.embedded import pool_path
from lora_recycle.merging import Restored, Undiluted
from lora_recycle.merging.base import dense_changes
from lora_recycle.runtime.files import atomic_write


RANK = 64
SHARES = (0.0, 0.15, 0.25, 0.33, 0.5)


def blends(pool: AdapterPool, learnt: str) -> dict[str, Weighted]:
    """Name to a merge of the whole change."""
    found = AdapterPool.from_pretrained(learnt, backbone=pool.backbone)
    own = dense_changes(found[0], pool.backbone.device)
    merges = {}
    for name, merge in (("restored", Restored()), ("undiluted", Undiluted())):
        rest = merge.changes(pool)
        for share in SHARES:
            whole = Weighted([own, rest], (share, 1 - share), None).changes(pool)
            merges[f"{share:g} of the learnt, {name}"] = Weighted([cut(whole, RANK)], (1,), None)
    return {**merges, "all of the learnt": Weighted([own], (1,), None)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--pool", nargs=3, action="append", required=True, metavar=("NAME", "ADAPTERS", "LEARNT"))
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    rows = []
    for title, source, learnt in args.pool:
        pool = AdapterPool.from_pretrained(sorted(pool_path().iterdir()) if source == "demo" else source)
        sets = validation_sets(args.data, pool.backbone.image_size, int(pool.backbone.processor.resample))
        episodes = {(d.name, k): sample_episodes(d.labels, 5, k, 15, 2000, seed=1) for d in sets for k in (1, 5)}
        with pool.folded() as backbone:
            average = evaluate_network(backbone, sets, episodes)
        for name, merge in blends(pool, learnt).items():
            (network,) = merge.networks(pool)
            with network as backbone:
                found = evaluate_network(backbone, sets, episodes)
            gains = {key: confidence(values - average[key]) for key, values in found.items()}
            rows.append({"pool": title, "blend": name, "gains": gains})
            print(title, name, {key: round(gain[0], 2) for key, gain in gains.items()}, flush=True)
    atomic_write(args.json, json.dumps({"rank": RANK, "rows": rows}, indent=1).encode())


if __name__ == "__main__":
    main()
