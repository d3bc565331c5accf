"""Size of a meta-LoRA's file against its accuracy on validation classes, from 32 bits to 1 bit for each weight.

    python examples/studies/small_files.py --data DATA --json docs/results/small_files.json

The sets are those of choose_recipe.py, at most 25 images of each class; 5-way, 600 episodes, 15 queries. What counts
is how much of the gain over the frozen backbone is left; `relative_error` is that of all weight changes, by the
Frobenius norm. What is finished is kept in the JSON when it is run again. No test class is read.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from common import evaluate_network, validation_sets

from lora_recycle import AdapterPool, MetaLoRAForFewShotClassification
from lora_recycle.adapters.pull import pull_adapter
from lora_recycle.backbones.backbone import Backbone
from lora_recycle.evaluation.results import confidence
from lora_recycle.fewshot.episodes import sample_episodes
from lora_recycle.hub.embedded import resolve_meta_lora
from lora_recycle.modeling.publishing import write_adapter
from lora_recycle.runtime.files import atomic_write


BITS = (32, 16, 8, 4, 2, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--bits", type=int, nargs="+", default=BITS)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    info = pull_adapter(resolve_meta_lora(args.model))
    backbone = Backbone.from_pretrained(info.base_model)
    sets = validation_sets(args.data, backbone.image_size, int(backbone.processor.resample), each=25)
    episodes = {(d.name, k): sample_episodes(d.labels, 5, k, 15, 600, seed=1) for d in sets for k in (1, 5)}
    frozen, whole = evaluate_network(backbone, sets, episodes), changes_of(info.path)
    rows = json.loads(args.json.read_text())["rows"] if args.json.exists() else []
    for bits in [b for b in args.bits if b not in {row["bits"] for row in rows}]:
        with tempfile.TemporaryDirectory() as folder:
            write_adapter(info, folder, bits)
            size, error = pull_adapter(folder).size_bytes, relative_error(changes_of(folder), whole)
            model = MetaLoRAForFewShotClassification.from_pretrained(folder)
        found = evaluate_network(model.backbone, sets, episodes)
        gains = {key: [round(number, 2) for number in confidence(found[key] - frozen[key])] for key in frozen}
        rows.append({"bits": bits, "bytes": size, "relative_error": error, "gain_over_frozen": gains})
        mean = sum(gain for gain, _ in gains.values()) / len(gains)
        print(f"{bits:2} bits, {size} bytes, mean gain {mean:+.2f}: {gains}", flush=True)
        atomic_write(args.json, json.dumps({"seed": 1, "episodes": 600, "rows": rows}, indent=1).encode())


def changes_of(folder) -> dict[str, torch.Tensor]:
    """The weight change of each layer."""
    return {module: b @ a for module, (b, a) in AdapterPool.from_pretrained(folder)[0].factors.items()}


def relative_error(found: dict[str, torch.Tensor], whole: dict[str, torch.Tensor]) -> float:
    squares = [((found[module] - change).square().sum(), change.square().sum()) for module, change in whole.items()]
    wrong, own = (sum(part).item() for part in zip(*squares, strict=True))
    return round((wrong / own) ** 0.5, 4)


if __name__ == "__main__":
    main()
