"""How the domains of a mixed pool disturb each other in one merge: the groups' averages at different strengths.

    lora-recycle invert demo --output runs/surrogate                                              # 10 minutes
    python examples/studies/group_weights.py --data DATA --surrogate runs/surrogate \
        --json docs/results/group_weights.json                                                    # 15 minutes

Each line of `STRENGTHS` is a factor for the average of each group of the embedded pool (`AdapterPool.groups`):
cifar_fs and mini_imagenet together (`photos`), vgg_flower (`flowers`), omniglot_small (`characters`); `cut` first cuts
the two small groups' averages to that rank. `REGRESSIONS` merge by images instead: each linear layer is to give what
every group's own layer gives on the images of that group (RegMean, arXiv 2212.09849), whose factor is its weight. The
images are the surrogates of its adapters, or 8 of each class that they were tuned on. `DISTILLED` are distilled from
the surrogates, unjudged and else with the defaults of `lora-recycle distill` but for the settings named (in bfloat16
under `accelerate launch --mixed_precision bf16`). 5-way, 600 episodes, on the validation splits of cifar_fs,
mini_imagenet and vgg_flower and on the 33 characters that no adapter saw, at most 40 images a class. DATA holds
`<set>/<split>.parquet`.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from common import FROM_INIT, Weighted, evaluate_network, validation_sets

from lora_recycle import AdapterPool, DistillationConfig, MetaLoRATrainer, SurrogateDataset
from lora_recycle.adapters.trainable import adapted_layers, linear_layers
from lora_recycle.evaluation.results import confidence
from lora_recycle.fewshot.episodes import sample_episodes
from lora_recycle.hub.embedded import pool_path
from lora_recycle.images.labelled import load_labelled_images
from lora_recycle.merging.base import Changes, Merge, add_scaled, dense_changes
from lora_recycle.runtime.files import atomic_write


GROUPS = {"photos": ("cifar_fs", "mini_imagenet"), "flowers": ("vgg_flower",), "characters": ("omniglot_small",)}

#: name: (factor of each of GROUPS, rank that the small groups are cut to)
STRENGTHS = {
    "frozen": ((0, 0, 0), None),
    "average": ((0.6, 0.2, 0.2), None),
    "restored": ((1, 0.2, 0.2), None),
    "undiluted": ((1, 1 / 3, 1 / 3), None),
    "between": ((1, 0.5, 0.5), None),
    "group-sum": ((1, 1, 1), None),
    "group-sum, cut 4": ((1, 1, 1), 4),
    "photos alone": ((1, 0, 0), None),
    "flowers alone": ((0, 1, 0), None),
    "characters alone": ((0, 0, 1), None),
}
#: name: (weight of each of GROUPS, whose images)
REGRESSIONS = {
    "regression on surrogate images": ((1, 1, 1), "surrogate"),
    "regression on surrogate images, photos x 4": ((4, 1, 1), "surrogate"),
    "regression on training images": ((1, 1, 1), "training"),
    "regression on training images, photos x 4": ((4, 1, 1), "training"),
}
#: name: settings of distillation other than the defaults; the last step is kept
DISTILLED = {
    "undiluted, distilled": {"init": "undiluted", **FROM_INIT},
    "group-sum, distilled": {"init": "group-sum", "share": 1.0},
    "a quarter of that, restored": {},
}
#: Of RegMean: what is left of the products of two different inputs, and a ridge as a share of the mean square.
KEPT, RIDGE = 0.9, 1e-3


class Regressed(Merge):
    """The least-squares solution over all groups on inputs of their own layers: sum(w D C) (sum w C)^-1, with D a
    group's average change, C the products of its layer's inputs (I, I), scaled to a trace of 1, and w its weight."""

    def __init__(self, averages: list[Changes], weights: tuple[float, ...], products: list[Changes]):
        self.averages, self.weights, self.products = averages, weights, products

    def changes(self, pool: AdapterPool) -> Changes:
        found = {}
        for name in self.products[0]:
            total = pressed = 0
            for average, weight, products in zip(self.averages, self.weights, self.products, strict=True):
                c = KEPT * products[name] + (1 - KEPT) * products[name].diag().diag()
                c = c * (weight / c.trace())
                total, pressed = total + c, pressed + average[name] @ c
            ridge = RIDGE * total.trace() / len(total) * torch.eye(len(total), device=total.device)
            found[name] = torch.linalg.solve(total + ridge, pressed.T).T
        return found


@torch.no_grad()
def input_products(pool: AdapterPool, average: Changes, pixels: torch.Tensor) -> Changes:
    """The sum of x x^T over all tokens x that enter each linear layer of a group's own network: (I, I) by weight."""
    found: Changes = {}

    def note(name: str, inputs: tuple) -> None:
        x = inputs[0].flatten(0, -2).float()
        add_scaled(found, {name: x.T @ x}, 1.0)

    (network,) = Weighted([average], (1,), None).networks(pool)
    with network as backbone:
        modules = [(f"{name}.weight", backbone.model.get_submodule(name)) for name in linear_layers(backbone)]
        hooks = [m.register_forward_pre_hook(lambda _, x, name=name: note(name, x)) for name, m in modules]
        for batch in pixels.split(128):
            backbone.model(pixel_values=backbone.normalize(batch.to(backbone.device)))
        for hook in hooks:
            hook.remove()
    return found


def images_of_groups(whose: str, surrogate: SurrogateDataset, data: Path, size: int, resample: int) -> list:
    """uint8 (N, 3, S, S) for each of GROUPS."""
    found, shards = [], [surrogate.shard(i) for i in range(surrogate.num_shards)]
    for names in GROUPS.values():
        if whose == "surrogate":
            found.append(torch.cat([s.pixels for s in shards if s.adapter["name"].startswith(names)]))
        else:
            paths = [data / name / "train.parquet" for name in names]
            found.append(torch.cat([load_labelled_images(path, size, resample, 8).pixels for path in paths]))
    return found


def average_of(pool: AdapterPool, names: tuple[str, ...]) -> Changes:
    members = [i for i, info in enumerate(pool.infos) if info.name.startswith(names)]
    total: Changes = {}
    for i in members:
        add_scaled(total, dense_changes(pool[i], pool.backbone.device), 1 / len(members))
    return total


def distilled(pool: AdapterPool, surrogate: SurrogateDataset, settings: dict, work: str) -> Merge:
    """What distillation makes of the pool. What the teachers say lies in `work`, for the next recipe too."""
    trainer = MetaLoRATrainer(pool, surrogate, DistillationConfig(validation_fraction=0.0, **settings))
    layers = adapted_layers(trainer.train(work, progress=False, resume=False).backbone.model)
    change = {f"{n}.weight": m.get_delta_weight("default").detach().float() for n, m in layers.items()}
    return Weighted([change], (1,), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--surrogate", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    pool = AdapterPool.from_pretrained(sorted(pool_path().iterdir()))
    averages = [average_of(pool, names) for names in GROUPS.values()]
    size, resample = pool.backbone.image_size, int(pool.backbone.processor.resample)
    merges: dict[str, Merge] = {name: Weighted(averages, *line) for name, line in STRENGTHS.items()}
    surrogate = SurrogateDataset.from_pretrained(args.surrogate)
    for whose in ("surrogate", "training"):
        pixels = images_of_groups(whose, surrogate, args.data, size, resample)
        products = [input_products(pool, *pair) for pair in zip(averages, pixels, strict=True)]
        lines = {name: weights for name, (weights, images) in REGRESSIONS.items() if images == whose}
        merges |= {name: Regressed(averages, weights, products) for name, weights in lines.items()}
    with tempfile.TemporaryDirectory() as work:
        merges |= {name: distilled(pool, surrogate, settings, work) for name, settings in DISTILLED.items()}
    sets = validation_sets(args.data, size, resample, each=40)
    episodes = {(d.name, k): sample_episodes(d.labels, 5, k, 15, 600, seed=1) for d in sets for k in (1, 5)}
    found = {}
    for name, merge in merges.items():
        (network,) = merge.networks(pool)
        with network as backbone:
            found[name] = evaluate_network(backbone, sets, episodes)
        print(name, {key: round(values.mean().item(), 1) for key, values in found[name].items()}, flush=True)
    rows = []
    for name, values in found.items():
        tasks = {
            key: {base: confidence(values[key] - found[base][key]) for base in ("frozen", "average")} for key in values
        }
        factors, rank = STRENGTHS.get(name) or (REGRESSIONS.get(name, (None,))[0], None)
        rows.append({"name": name, "factors": factors, "rank": rank, "tasks": tasks})
    atomic_write(args.json, json.dumps({"groups": GROUPS, "rows": rows}, indent=1).encode())


if __name__ == "__main__":
    main()
