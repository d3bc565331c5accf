"""Compare settings of inversion and distillation by what comes out at the end, on validation classes.

    python examples/studies/choose_recipe.py --data DATA --work runs/choice --json docs/results/choice.json

Two shells share the variants with `--part 0 2` and `--part 1 2`; the JSON appears when the last variant is done.
Changes one thing at a time against the base recipe, on 12 of the embedded adapters (3 of each data set), and measures
the meta-LoRA on classes that no adapter saw: the validation splits of cifar_fs, mini_imagenet and vgg_flower, and the
33 characters of omniglot_small's training split that the pool leaves out. DATA holds `<set>/<split>.parquet`. Finished
variants are kept in the work folder when it is run again. No test class is read.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from common import BASE_DISTILL, BASE_INVERT, evaluate_network, validation_sets

from lora_recycle import AdapterPool, Backbone, DistillationConfig, InversionConfig, LoRAInverter, MetaLoRATrainer
from lora_recycle.evaluation.results import confidence
from lora_recycle.fewshot.episodes import sample_episodes
from lora_recycle.hub.embedded import pool_path
from lora_recycle.images.labelled import load_labelled_images
from lora_recycle.runtime.files import atomic_write
from lora_recycle.surrogate.dataset import Shard, SurrogateDataset, save_shard, write_manifest


NATURAL = "tiny_imagenet_32/train.parquet"
MIX = {"dead-leaves": 0.5, "fractal": 0.25, "strokes": 0.25}

#: name: (settings of inversion, settings of distillation) that differ from the base
VARIANTS = {
    "base (dead leaves, tv)": ({}, {}),
    "start: noise": ({"starts": {"noise": 1}}, {}),
    "start: fractal": ({"starts": {"fractal": 1}}, {}),
    "start: dead leaves, fractal, strokes": ({"starts": MIX}, {}),
    "start: unlabelled natural images": ({"starts": {"images": 1}, "start_images": NATURAL}, {}),
    "mix, no inversion": ({"starts": MIX, "iterations": 0}, {}),
    "mix, patch entropy": ({"starts": MIX, "priors": {"tv": 0.1, "patch_entropy": 0.1}}, {}),
    "mix, batch norm of a CNN": ({"starts": MIX, "priors": {"tv": 0.1, "batch_norm": 232}}, {}),
    "mix, one group": ({"starts": MIX}, {"groups": "one"}),
    "mix, episodes only (KL + interpolation)": (
        {"starts": MIX},
        {"relational_weight": 0, "kl_weight": 1, "interpolation_weight": 1, "queries": 1},
    ),
    "mix, start from zero": ({"starts": MIX}, {"init": "zero"}),
    "mix, half the step size": ({"starts": MIX}, {"lr": 5e-4}),
    "mix, rank 32": ({"starts": MIX}, {"rank": 32}),
    "pixels, Adam 0.05": ({"parameterization": "pixels", "lr": 0.1}, {}),  # of [0, 1], here of its deviation 0.5
    "natural images, no inversion": ({"starts": {"images": 1}, "start_images": NATURAL, "iterations": 0}, {}),
    "own training images": ({"own_images": 2}, {}),
    "own training images, 8 times as many": ({"own_images": 16}, {}),
    "mix, batch norm of a CNN, weight 1": ({"starts": MIX, "priors": {"tv": 0.1, "batch_norm": 1}}, {}),
}


def with_own_images(surrogate: SurrogateDataset, data: Path, each: int, backbone: Backbone) -> SurrogateDataset:
    """The same shards with `each` training images of every class that they hold: what surrogates stand for.

    For losses that read images alone: the logits stored beside them just name the class.
    """
    files, loaded = [], {}
    for i in range(surrogate.num_shards):
        shard, name = surrogate.shard(i), surrogate.manifest["shards"][i]["file"]
        domain = shard.adapter["name"].rsplit("-", 1)[0]
        if domain not in loaded:
            path = data / domain / "train.parquet"
            loaded = {domain: load_labelled_images(path, backbone.image_size, int(backbone.processor.resample))}
        images, generator = loaded[domain], torch.Generator().manual_seed(i)
        by_class, rows, labels = images.by_class(), [], []
        for label in shard.labels.unique().tolist():
            found = by_class[images.label_names.index(shard.label_names[label])]
            rows.append(found[torch.randperm(len(found), generator=generator)[:each]])
            labels += [label] * len(rows[-1])
        labels = torch.tensor(labels)
        logits = 10.0 * F.one_hot(labels, shard.teacher_logits.shape[1]).float()
        features = torch.zeros(len(labels), shard.teacher_features.shape[1], dtype=torch.float16)
        files.append(surrogate.folder / name)
        save_shard(files[-1], Shard(shard.adapter, images.pixels[torch.cat(rows)], labels, logits, features), "own")
    header = {key: value for key, value in surrogate.manifest.items() if key != "shards"}
    return write_manifest(surrogate.folder, header, files)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--pool", type=Path, default=pool_path())
    parser.add_argument("--part", nargs=2, type=int, default=(0, 1), metavar=("I", "N"), help="every N-th from I on")
    args = parser.parse_args()
    chosen = sorted(p for p in args.pool.iterdir() if int(p.name[-2:]) in (1, 5, 6))
    pool = AdapterPool.from_pretrained(chosen)
    backbone = pool.backbone
    sets = validation_sets(args.data, backbone.image_size, int(backbone.processor.resample))
    episodes = {(d.name, k): sample_episodes(d.labels, 5, k, 15, 600, seed=1) for d in sets for k in (1, 5)}
    frozen = evaluate_network(backbone, sets, episodes)
    with pool.folded() as averaged:
        average = evaluate_network(averaged, sets, episodes)
    args.work.mkdir(parents=True, exist_ok=True)
    finished = {name: args.work / f"{i:02d}.json" for i, name in enumerate(VARIANTS)}
    first, parts = args.part
    for name, path in list(finished.items())[first::parts]:
        if not path.exists():
            result = try_variant(pool, *VARIANTS[name], args.work / path.stem, args.data, sets, episodes, average)
            atomic_write(path, json.dumps(result).encode())
            gains = "  ".join(f"{k} {v[0]:+.2f}±{v[1]:.2f}" for k, v in result.items() if k != "seconds")
            print(f"{name}: against the average: {gains}", flush=True)
    if all(path.exists() for path in finished.values()):
        results = {"average of 12, against frozen": {k: confidence(average[k] - frozen[k]) for k in frozen}}
        results |= {name: json.loads(path.read_text()) for name, path in finished.items()}
        atomic_write(args.json, json.dumps(results, indent=1).encode())


def try_variant(pool, invert, distill, folder, data, sets, episodes, average) -> dict:
    """Paired gain over the pool's average, with its 95% interval, by "<set> <shots>"; and the seconds it took."""
    started = time.perf_counter()
    shutil.rmtree(folder, ignore_errors=True)
    own_images = invert.get("own_images")
    if own_images:
        invert = {"iterations": 0}
    if "start_images" in invert:
        invert = {**invert, "start_images": str(data / invert["start_images"])}
    surrogate = LoRAInverter(pool, InversionConfig(**{**BASE_INVERT, **invert})).run(folder)
    if own_images:
        surrogate = with_own_images(surrogate, data, own_images, pool.backbone)
    student = MetaLoRATrainer(
        pool, surrogate, DistillationConfig(validation_fraction=0.0, **{**BASE_DISTILL, **distill})
    ).train()
    seconds = round(time.perf_counter() - started)
    accuracy = evaluate_network(student.backbone, sets, episodes)
    return {key: confidence(accuracy[key] - average[key]) for key in average} | {"seconds": seconds}


if __name__ == "__main__":
    main()
