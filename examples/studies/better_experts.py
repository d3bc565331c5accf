"""Whether an expert can be better than the average of its adapters: scaled, or distilled on its own surrogate images.

    lora-recycle invert demo --output runs/surrogate                                     # 12 minutes on two idle cores
    python examples/studies/better_experts.py --data DATA --surrogate runs/surrogate --work runs/experts \
        --json docs/results/better_experts.json                                          # 10 minutes

For each domain of the shipped pool that `fit` can choose: the average of its adapters times 0.7 to 2.5, and the LoRA
that 200 steps of distillation make of that average with the recipe's defaults, everything learnt kept, no adapter held
out. 5-way, 600 episodes, 15 queries, on validation classes (of omniglot_small the 33 characters of its training split
that no adapter saw). DATA holds `<set>/<split>.parquet`. Distilled LoRAs are kept in `--work`.
"""

import argparse
import json
from pathlib import Path

import torch
from common import validation_sets

from lora_recycle import AdapterPool, DistillationConfig, MetaLoRAForFewShotClassification, MetaLoRATrainer
from lora_recycle.backbones.backbone import extract_features
from lora_recycle.distillation.experts import pool_domains
from lora_recycle.evaluation.results import confidence
from lora_recycle.fewshot.accuracy import prototype_accuracy
from lora_recycle.fewshot.episodes import sample_episodes
from lora_recycle.hub.embedded import pool_path
from lora_recycle.merging.factors import worn_factors
from lora_recycle.runtime.files import atomic_write
from lora_recycle.surrogate.dataset import SurrogateDataset


SCALES = (0.7, 1.3, 1.6, 2.0, 2.5)


def scaled_features(pool: AdapterPool, scale: float, images: torch.Tensor) -> torch.Tensor:
    """(N, D) by the backbone with the average of a pool's adapters times `scale`."""
    factors = {module: (b * scale, a) for module, (b, a) in pool.average().items()}
    with worn_factors(pool.backbone, factors) as backbone:
        return extract_features(backbone, images)


def distilled(pool: AdapterPool, surrogate: SurrogateDataset, folder: Path) -> MetaLoRAForFewShotClassification:
    if not folder.is_dir():
        config = DistillationConfig(init="average", share=1.0, validation_fraction=0.0, experts=False)
        trainer = MetaLoRATrainer(pool, surrogate, config)
        trainer.train(folder.with_name(f"{folder.name}-training"))
        trainer.to_model().save_pretrained(folder)
    return MetaLoRAForFewShotClassification.from_pretrained(folder)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DATA")
    parser.add_argument("--surrogate", type=Path, required=True, metavar="DIR")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR")
    parser.add_argument("--episodes", type=int, default=600)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    args = parser.parse_args(arguments)
    pool = AdapterPool.from_pretrained(pool_path())
    size, resample = pool.backbone.image_size, int(pool.backbone.processor.resample)
    data = {one.name.split("/")[0]: one for one in validation_sets(args.data, size, resample, each=40)}
    surrogate, rows = SurrogateDataset.from_pretrained(args.surrogate), []
    for expert, group in pool_domains(pool):
        images, own = data[expert.name], pool.subset(group)
        features = {f"scale {scale}": scaled_features(own, scale, images.pixels) for scale in (1.0, *SCALES)}
        model = distilled(own, surrogate, args.work / expert.name)
        features["distilled"] = extract_features(model.network(), images.pixels)
        frozen = extract_features(pool.backbone, images.pixels)
        for shots in (1, 5):
            drawn = sample_episodes(images.labels, 5, shots, 15, args.episodes, 0, images.label_names, images.name)
            accuracies = {name: prototype_accuracy(values, drawn) for name, values in features.items()}
            average = accuracies.pop("scale 1.0")
            row = {"domain": expert.name, "shots": shots, "adapters": len(group)}
            row["gain"] = confidence(average - prototype_accuracy(frozen, drawn))
            row["over the average"] = {name: confidence(values - average) for name, values in accuracies.items()}
            rows.append(row)
            print(row, flush=True)
    atomic_write(args.json, json.dumps({"episodes": args.episodes, "rows": rows}, indent=1, allow_nan=False).encode())


if __name__ == "__main__":
    main()
