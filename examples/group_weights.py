"""How the domains of a mixed pool disturb each other in one merge: the groups' averages at different strengths.

    python examples/group_weights.py --data DATA --json docs/results/group_weights.json          # 3 minutes

Each line of `STRENGTHS` is a factor for the average of each group of the embedded pool (`AdapterPool.groups`):
cifar_fs and mini_imagenet together (`photos`), vgg_flower (`flowers`), omniglot_small (`characters`); `cut` first cuts
the two small groups' averages to that rank. 5-way, 600 episodes, on the validation splits of cifar_fs, mini_imagenet
and vgg_flower and on the 33 characters that no adapter saw, at most 40 images a class. DATA holds
`<set>/<split>.parquet`.
"""

import argparse
import json
from pathlib import Path

import torch
from choose_recipe import judge, validation_sets

from lora_recycle import AdapterPool
from lora_recycle.composition.base import Changes, Merge, add_scaled, dense_changes
from lora_recycle.embedded import pool_path
from lora_recycle.evaluation.episodes import sample_episodes
from lora_recycle.evaluation.protocol import confidence
from lora_recycle.storage import atomic_write


GROUPS = {"photos": ("cifar_fs", "mini_imagenet"), "flowers": ("vgg_flower",), "characters": ("omniglot_small",)}

#: name: (factor of each of GROUPS, rank that the small groups are cut to)
STRENGTHS = {
    "frozen": ((0, 0, 0), None),
    "average": ((0.6, 0.2, 0.2), None),
    "undiluted": ((1, 1 / 3, 1 / 3), None),
    "between": ((1, 0.5, 0.5), None),
    "group-sum": ((1, 1, 1), None),
    "group-sum, cut 4": ((1, 1, 1), 4),
    "photos alone": ((1, 0, 0), None),
    "flowers alone": ((0, 1, 0), None),
    "characters alone": ((0, 0, 1), None),
}


class Weighted(Merge):
    """The groups' averages, each times a factor of its own, the small ones cut to a rank."""

    def __init__(self, averages: list[Changes], factors: tuple[float, ...], rank: int | None):
        self.averages, self.factors, self.rank = averages, factors, rank

    def changes(self, pool: AdapterPool) -> Changes:
        total: Changes = {}
        for i, (average, factor) in enumerate(zip(self.averages, self.factors, strict=True)):
            add_scaled(total, cut(average, self.rank) if i and self.rank else average, factor)
        return total


def average_of(pool: AdapterPool, names: tuple[str, ...]) -> Changes:
    members = [i for i, info in enumerate(pool.infos) if info.name.startswith(names)]
    total: Changes = {}
    for i in members:
        add_scaled(total, dense_changes(pool[i], pool.backbone.device), 1 / len(members))
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    pool = AdapterPool.from_pretrained(sorted(pool_path().iterdir()))
    averages = [average_of(pool, names) for names in GROUPS.values()]
    sets = validation_sets(args.data, pool.backbone.image_size, int(pool.backbone.processor.resample), each=40)
    episodes = {(d.name, k): sample_episodes(d.labels, 5, k, 15, 600, seed=1) for d in sets for k in (1, 5)}
    found = {}
    for name, (factors, rank) in STRENGTHS.items():
        (network,) = Weighted(averages, factors, rank).networks(pool)
        with network as backbone:
            found[name] = judge(backbone, sets, episodes)
        print(name, {key: round(values.mean().item(), 1) for key, values in found[name].items()}, flush=True)
    rows = []
    for name, values in found.items():
        tasks = {
            key: {base: confidence(values[key] - found[base][key]) for base in ("frozen", "average")} for key in values
        }
        rows.append({"name": name, "factors": STRENGTHS[name][0], "rank": STRENGTHS[name][1], "tasks": tasks})
    atomic_write(args.json, json.dumps({"groups": GROUPS, "rows": rows}, indent=1).encode())


if __name__ == "__main__":
    main()
