r"""Types and starts of the meta-adapter: accuracy on validation classes, parameters, size and speed.

    python examples/studies/adapter_types.py --data DATA --surrogate runs/choice/07 --work runs/types \
        --json docs/results/adapter_types.json

The surrogate images are those of choose_recipe.py with the batch-norm prior, of 12 adapters. Every variant takes the
same steps on the same images and is measured on the sets of choose_recipe.py (at most 15 images of each class; 5-way,
300 episodes, seed 1), after it was saved and loaded as a plain PEFT adapter. Finished variants are kept when it is run
again. Seconds are processor time of this process, steps alone. No test class is read.
"""

import argparse
import json
import time
from pathlib import Path

from common import FROM_INIT, evaluate_network, validation_sets

from lora_recycle import (
    AdapterPool,
    DistillationConfig,
    MetaLoRAForFewShotClassification,
    MetaLoRATrainer,
    SurrogateDataset,
)
from lora_recycle.adapters.places import find_adapters
from lora_recycle.adapters.pull import pull_adapter
from lora_recycle.distillation.config import PRINCIPAL_STARTS
from lora_recycle.evaluation.results import confidence
from lora_recycle.fewshot.episodes import sample_episodes
from lora_recycle.hub.embedded import pool_path
from lora_recycle.runtime.files import atomic_write


#: name: what differs from a LoRA that starts from the average
VARIANTS = {
    "LoRA, average": {"init": "average"},
    "DoRA, average": {"peft_type": "DORA", "init": "average"},
    "SHiRA, average": {"peft_type": "SHIRA", "init": "average"},
    "LoRA, zero": {"init": "zero"},
    "LoRA, PiSSA": {"init": "pissa"},
    "LoRA, OLoRA": {"init": "olora"},
    "LoRA, CorDA": {"init": "corda"},
    "DoRA, zero": {"peft_type": "DORA", "init": "zero"},
    "SHiRA, zero": {"peft_type": "SHIRA", "init": "zero"},
    "IA3": {"peft_type": "IA3", "init": "zero", "lr": 1e-2},
    "OFT": {"peft_type": "OFT", "init": "zero"},
    "LoHa": {"peft_type": "LOHA", "init": "zero"},
    "LoKr": {"peft_type": "LOKR", "init": "zero"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--surrogate", type=Path, required=True)
    parser.add_argument("--pool", type=Path, default=pool_path())
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--relational-batch", type=int, default=32)
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    surrogate = SurrogateDataset.from_pretrained(args.surrogate)
    inverted = {entry["adapter"]["sha256"] for entry in surrogate.manifest["shards"]}
    pool = AdapterPool.from_pretrained([p for p in find_adapters(args.pool) if pull_adapter(p).sha256 in inverted])
    backbone = pool.backbone
    shared = {"rank": 16, "lr": 1e-3, "steps": args.steps, "relational_batch": args.relational_batch, **FROM_INIT}
    sets = validation_sets(args.data, backbone.image_size, int(backbone.processor.resample), each=15)
    episodes = {(d.name, k): sample_episodes(d.labels, 5, k, 10, 300, seed=1) for d in sets for k in (1, 5)}
    rows, frozen = [], None
    for name in args.only:
        finished = args.work / f"{name}.json"
        if not finished.exists():
            frozen = frozen or evaluate_network(backbone, sets, episodes)
            row = try_variant(pool, surrogate, {**shared, **VARIANTS[name]}, args.work / name, sets, episodes, frozen)
            atomic_write(finished, json.dumps({"variant": name, **row}).encode())
        rows.append(json.loads(finished.read_text()))
        print(json.dumps(rows[-1]), flush=True)
    atomic_write(args.json, json.dumps({**shared, "seed": 1, "rows": rows}, indent=1).encode())


def try_variant(pool, surrogate, settings, folder, sets, episodes, frozen) -> dict:
    trainer = MetaLoRATrainer(pool, surrogate, DistillationConfig(validation_fraction=0.0, **settings))
    trainer.prepare(folder.parent, progress=False)  # what the teachers say lies there, once for all variants
    started = time.process_time()
    for step in range(trainer.config.steps):
        trainer.step(step)
    seconds = time.process_time() - started
    trainer.close()
    half = 2 if trainer.config.init in PRINCIPAL_STARTS else 1  # the other half of their rank stays as it is
    learning = sum(p.numel() for p in trainer.student.trainable()) // half
    trainer.to_model().save_pretrained(folder)
    found = evaluate_network(MetaLoRAForFewShotClassification.from_pretrained(folder).backbone, sets, episodes)
    info = pull_adapter(folder)
    gains = {key: [round(number, 2) for number in confidence(found[key] - frozen[key])] for key in frozen}
    return {
        "gain_over_frozen": gains,
        "mean_gain": round(sum(gain for gain, _ in gains.values()) / len(gains), 2),
        "learned": learning,
        "stored": info.num_parameters,
        "seconds_a_step": round(seconds / trainer.config.steps, 3),
    }


if __name__ == "__main__":
    main()
