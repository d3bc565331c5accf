"""Make the mixed pool of adapters that the package embeds, or a larger one.

    python examples/studies/make_pool.py --data DATA --output pool/            # one process
    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 \
        examples/studies/make_pool.py --data DATA --output pool/               # two, on CPU
    python examples/studies/make_pool.py --data DATA --output pool100/ --count 40 28 18 14    # 100, mixed
    python examples/studies/make_pool.py --data DATA --output cifar100/ --only cifar_fs --count 100
    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 8 \
        examples/studies/make_pool.py --data DATA --output cifar100/ --only cifar_fs --count 100 --device cuda

DATA holds `<set>/train.parquet` for cifar_fs, mini_imagenet, vgg_flower and omniglot_small. 40 tasks of unequal kinds,
as on the Hub: ranks 2 to 16, all linear layers or q and v only, 3 to 64 classes, key names of transformers 4 and 5, a
DoRA and a LoHa. 33 characters of omniglot_small stay unseen, for validation. Where `--count` asks for more of a data
set than that, the others are plain LoRAs of rank 8, 4, 16, 8, ... on other classes; the first ones are the same ones.
Finished adapters are kept when it is run again.
"""

import argparse
import json
from pathlib import Path

import torch
from common import HELD_BACK
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from lora_recycle.backbones.backbone import Backbone
from lora_recycle.hub.embedded import BACKBONE_NAME
from lora_recycle.images.labelled import load_labelled_images
from lora_recycle.pool.config import AdapterTrainingConfig
from lora_recycle.pool.training import train_adapter
from lora_recycle.runtime.launch import choose_device, process_state


#: data set: (settings of all its tasks, settings of each task)
PLAN = {
    "cifar_fs": (
        {"classes": 10, "images_per_class": 200, "validation_images": 50, "epochs": 4},
        [
            {"classes": 64, "images_per_class": 50, "rank": 16},
            {"classes": 20, "images_per_class": 120, "rank": 16},
            {"classes": 15, "images_per_class": 150, "peft_type": "DORA"},
            {"legacy": True},
            {"legacy": True, "targets": "q_proj,v_proj", "rank": 16},
            {"targets": "q_proj,v_proj"},
            {"rank": 2},
            {"rank": 4},
            {"rank": 16},
            {},
            {},
            {},
            {},
            {"classes": 3, "images_per_class": 400},
        ],
    ),
    "mini_imagenet": (
        {"classes": 10, "images_per_class": 200, "validation_images": 50, "epochs": 5},
        [
            {"classes": 20, "images_per_class": 120, "rank": 16},
            {"classes": 15, "images_per_class": 150},
            {"legacy": True},
            {"peft_type": "LOHA"},
            {"targets": "q_proj,v_proj"},
            {"rank": 4},
            {"rank": 16},
            {"seed": 1},
            {},
            {"classes": 5, "images_per_class": 250},
        ],
    ),
    "vgg_flower": (
        {"classes": 12, "images_per_class": 200, "epochs": 6},
        [
            {"classes": 40, "rank": 16, "epochs": 4},
            {"classes": 20},
            {"legacy": True},
            {"rank": 4},
            {"rank": 16},
            {},
            {},
            {"targets": "q_proj,v_proj"},
        ],
    ),
    "omniglot_small": (
        {"classes": 20, "images_per_class": 200, "epochs": 12, "flip": False},
        [
            {"classes": 60, "rank": 16, "epochs": 8},
            {"classes": 40},
            {"legacy": True},
            {"rank": 4},
            {"rank": 16},
            {},
            {},
            {"targets": "q_proj,v_proj"},
        ],
    ),
}

#: ranks of the adapters beyond the plan, in turn
FURTHER_RANKS = (8, 4, 16, 8)


#: names of transformers 5 and what the same layers were called under transformers 4
LEGACY_NAMES = {
    "vit.layers.": "vit.encoder.layer.",
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
LEGACY_TARGETS = {"q_proj": "query", "k_proj": "key", "v_proj": "value"}


def rename_to_transformers_4(folder: Path) -> None:
    """Give an adapter the names that it would have had if it had been tuned under transformers 4."""
    weights = folder / "adapter_model.safetensors"
    with safe_open(weights, "pt") as file:
        metadata = file.metadata()
    renamed = {}
    for key, tensor in load_file(weights).items():
        for new, old in LEGACY_NAMES.items():
            key = key.replace(new, old)
        renamed[key] = tensor
    save_file(renamed, weights, metadata=metadata)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["target_modules"] = sorted({LEGACY_TARGETS.get(name, "dense") for name in config["target_modules"]})
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--backbone", default="demo", help="folder of the backbone, `demo` for the embedded one")
    parser.add_argument("--only", nargs="*", default=list(PLAN), help="data sets")
    parser.add_argument("--count", nargs="*", type=int, help="adapters of each of these sets (default: the plan's)")
    parser.add_argument("--max-per-class", type=int, help="read at most so many images of each class")
    parser.add_argument("--lr", type=float, help="peak step size (default: that of train-adapters)")
    parser.add_argument("--device", help="as torch names it")
    args = parser.parse_args()
    counts = args.count or [len(PLAN[name][1]) for name in args.only]
    if len(counts) != len(args.only):
        parser.error(f"--count: {len(args.only)} numbers are needed, for {', '.join(args.only)}")
    device, state, backbone = choose_device(args.device), process_state(), Backbone.from_pretrained(args.backbone)

    tasks = [(name, i) for name, count in zip(args.only, counts, strict=True) for i in range(count)]
    data = {}
    args.output.mkdir(parents=True, exist_ok=True)
    for name, i in tqdm(tasks[state.process_index :: state.num_processes], desc="make_pool"):
        target = args.output / f"{name}-{i:02d}"
        if target.exists():
            continue
        if name not in data:
            path = args.data / name / "train.parquet"
            size, resample = backbone.image_size, int(backbone.processor.resample)
            data = {name: load_labelled_images(path, size, resample, args.max_per_class)}
        common, own = PLAN[name]
        settings = {
            **common,
            **(own[i] if i < len(own) else {"rank": FURTHER_RANKS[i % len(FURTHER_RANKS)], "keep_ratio": 0.5}),
        }
        legacy = settings.pop("legacy", False) and args.backbone == "demo"  # the old names of other families differ
        config = AdapterTrainingConfig(**settings, **({"lr": args.lr} if args.lr else {}))
        seed = 100 * config.seed + i
        draw = torch.Generator().manual_seed(seed)
        available = len(data[name].label_names) - HELD_BACK.get(name, 0)
        classes = torch.randperm(available, generator=draw)[: config.classes].tolist()
        base = BACKBONE_NAME if args.backbone == "demo" else args.backbone
        unfinished = args.output / f".{target.name}"
        results = train_adapter(data[name], classes, unfinished, config, base, seed, device)
        if legacy:
            rename_to_transformers_4(unfinished)
        unfinished.rename(target)
        tqdm.write(f"{target.name}: {results} {settings}")


if __name__ == "__main__":
    main()
