"""Compare few-shot heads and their settings on validation classes, as differences to prototypes.

    python examples/studies/choose_heads.py --data DATA --shots 1 5 --json docs/results/heads.json
    python examples/studies/choose_heads.py --data DATA --shots 1 5 --split test --json docs/results/heads_test.json

DATA holds `<set>/<split>.parquet` of cifar_fs, mini_imagenet and vgg_flower. With surrogate data (`--surrogate`) the
parameters of unrolled EM are learned as well (`fit_head`). `--variants` compares other settings of the heads, on
validation classes, where they are chosen; `--split test` looks once at what was chosen.
"""

import argparse
import json
import math
from pathlib import Path

from lora_recycle import MetaLoRAForFewShotClassification, SurrogateDataset, fit_head
from lora_recycle.backbones.backbone import extract_features
from lora_recycle.evaluation.results import confidence
from lora_recycle.fewshot.accuracy import head_accuracy
from lora_recycle.fewshot.episodes import sample_episodes
from lora_recycle.fewshot.heads import HEADS, make_head
from lora_recycle.images.labelled import load_labelled_images
from lora_recycle.runtime.files import atomic_write


SETS = ("cifar_fs", "mini_imagenet", "vgg_flower")
LAYERS = 10


def heads_as_they_are() -> dict:
    found = {name: make_head(name, {}) for name in HEADS if name not in ("prototypes", "cosine_prototypes")}
    return {**found, "transductive_laplacian, not rectified": HEADS["transductive_laplacian"](rectify=False)}


def variants() -> dict:
    found = heads_as_they_are()
    for shrinkage in (0.5, 0.7, 0.8, 0.9, 0.95, 0.98):
        found[f"lda, shrinkage {shrinkage}"] = HEADS["lda"](shrinkage)
    for neighbours in (2, 4):
        for smoothness in (0.2, 0.5, 1.0):
            head = HEADS["transductive_laplacian"](neighbours, smoothness)
            found[f"transductive_laplacian, neighbours {neighbours}, smoothness {smoothness}"] = head
    for entropy in (0.02, 0.05, 0.1):
        for passes in (1, 2, 5):
            head = HEADS["transductive_transport"](entropy, passes)
            found[f"transductive_transport, entropy {entropy}, passes {passes}"] = head
    for temperature in (2.0, 3.0, 10.0, 15.0, 30.0):
        head = HEADS["transductive_information"](temperature)
        found[f"transductive_information, temperature {temperature:g}"] = head
    for square in (20, 50, 100, 200):
        head = HEADS["transductive_em"](math.sqrt(square), (1.0,) * LAYERS, (1.0,) * LAYERS)
        found[f"transductive_em, scale^2 {square}"] = head
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--surrogate", type=Path)
    parser.add_argument("--split", default="validation", choices=("validation", "test"))
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 5, 20])
    parser.add_argument("--episodes", type=int, default=200)
    parser.add_argument("--variants", action="store_true", help="other settings of the heads as well")
    parser.add_argument("--max-per-class", type=int, default=60)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.variants and args.split == "test":
        parser.error("settings are chosen on validation classes: --variants goes with --split validation")
    model = MetaLoRAForFewShotClassification.from_pretrained(args.model)
    heads = variants() if args.variants else heads_as_they_are()
    if args.surrogate:
        surrogate = SurrogateDataset.from_pretrained(args.surrogate)
        model.head = heads["transductive_em"]
        heads["transductive_em, fitted"] = fit_head(model, surrogate)
        print(model.head.parameters())
    size, resample = model.backbone.image_size, int(model.backbone.processor.resample)
    rows = []
    for name in SETS:
        path = args.data / name / f"{args.split}.parquet"
        data = load_labelled_images(path, size, resample, args.max_per_class)
        features = extract_features(model.backbone, data.pixels)
        for shots in args.shots:
            drawn = sample_episodes(data.labels, 5, shots, 15, args.episodes, 0)
            base = head_accuracy(features, drawn, HEADS["prototypes"]())
            print(f"{name}, {shots}-shot, prototypes {base.mean():.2f}")
            for label, head in heads.items():
                delta, ci95 = confidence(head_accuracy(features, drawn, head) - base)
                rows.append({"data": name, "shots": shots, "head": label, "delta": round(delta, 2)})
                rows[-1]["delta_ci95"] = round(ci95, 2)
                print(f"  {label:60} {delta:+6.2f} ± {ci95:.2f}", flush=True)
    if args.json:
        atomic_write(args.json, json.dumps({"rows": rows}, indent=1).encode())


if __name__ == "__main__":
    main()
