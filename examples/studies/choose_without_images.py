"""Can a figure that needs no real images tell which meta-LoRA is better? Many distillations, several figures of each.

    lora-recycle invert demo --output runs/surrogate             # 10 minutes
    python examples/studies/choose_without_images.py --data DATA --surrogate runs/surrogate --work runs/figures \
        --json docs/results/figures.json                                                       # half an hour

Every fourth adapter of each group of the embedded pool, with its surrogate images, is kept from all runs. `RUNS`
distils the others with one setting after the other; after a third of the steps and at the end the student is judged
twice: by `FIGURES` on the images of the adapters that taught nothing, and by real images of validation classes. All
are differences to the run's own start, which took seconds. DATA holds `<set>/<split>.parquet`; no test class is read.
Two shells share the runs with `--part 0 2` and `--part 1 2`; finished runs are kept in the work folder, and the JSON
appears when the last one is done.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from common import FROM_INIT, evaluate_network, validation_sets
from scipy.stats import spearmanr

from lora_recycle import AdapterPool, DistillationConfig, MetaLoRATrainer
from lora_recycle.backbones.backbone import extract_features
from lora_recycle.distillation.callbacks import TrainerCallback
from lora_recycle.fewshot.accuracy import prototype_accuracy
from lora_recycle.fewshot.episodes import sample_episodes
from lora_recycle.fewshot.prototypes import class_prototypes, prototype_logits
from lora_recycle.fewshot.relations import relational_divergence
from lora_recycle.hub.embedded import pool_path
from lora_recycle.runtime.files import atomic_write
from lora_recycle.surrogate.dataset import SurrogateDataset


TEMPERATURE = 0.1
BASE = {"rank": 16, "steps": 60, "relational_batch": 64, "lr": 5e-4, "init": "undiluted", **FROM_INIT}
EPISODES = {"relational_weight": 0, "kl_weight": 1, "interpolation_weight": 1, "queries": 3}

#: name: settings of distillation that differ from the base
RUNS = {
    "base": {},
    "seed 1": {"seed": 1},
    "lr 1e-4": {"lr": 1e-4},
    "lr 2e-3": {"lr": 2e-3},
    "lr 5e-3": {"lr": 5e-3},
    "20 steps": {"steps": 20},
    "200 steps": {"steps": 200},
    "start: average": {"init": "average"},
    "start: average, lr 2e-3": {"init": "average", "lr": 2e-3},
    "start: zero": {"init": "zero"},
    "start: zero, lr 2e-3": {"init": "zero", "lr": 2e-3},
    "one group": {"groups": "one"},
    "whole images": {"use_masks": False},
    "scale 5": {"similarity_scale": 5.0},
    "scale 40": {"similarity_scale": 40.0},
    "rank 4": {"rank": 4},
    "rank 64": {"rank": 64},
    "from layer 3": {"first_layer": 3},
    "KL": {**EPISODES, "interpolation_weight": 0},
    "interpolation": {**EPISODES, "kl_weight": 0},
    "KL and interpolation": EPISODES,
    "KL and interpolation, start: zero": {**EPISODES, "init": "zero"},
    "all losses": {**EPISODES, "relational_weight": 1},
    "all losses, lr 2e-3": {**EPISODES, "relational_weight": 1, "lr": 2e-3},
}

#: What is measured on surrogate images of an adapter; lower is better. `divergence`: of the similarities between
#: images from those that the adapter itself finds, which saw them whole. The others are of 5-way 1-shot episodes of
#: its classes: per cent of queries that go to the wrong prototype, cross-entropy of the answers, and their KL to
#: the adapter's own head.
KINDS = ("divergence", "episode error", "episode loss", "episode KL")
#: the same of adapters that taught nothing, and of as many that did
FIGURES = (*KINDS, *(f"{kind}, taught" for kind in KINDS))


class Judge(TrainerCallback):
    """Figures and accuracies of the student at some steps."""

    def __init__(self, surrogate, unseen: AdapterPool, taught: AdapterPool, sets, episodes, at: set[int]):
        entries = {entry["adapter"]["sha256"]: i for i, entry in enumerate(surrogate.manifest["shards"])}
        self.unseen, self.taught = (
            [surrogate.shard(entries[info.sha256]) for info in part.infos] for part in (unseen, taught)
        )
        self.sets, self.episodes, self.at, self.points = sets, episodes, at, []

    def on_step_end(self, trainer, step):
        if step + 1 in self.at:
            self.points.append(self.look(trainer.student.backbone, step + 1))

    @torch.inference_mode()
    def look(self, network, step: int) -> dict:
        point = {"step": step}
        for suffix, shards in (("", self.unseen), (", taught", self.taught)):
            found = [self._figures(network, shard) for shard in shards]
            point |= {kind + suffix: sum(figures[kind] for figures in found) / len(found) for kind in KINDS}
        real = evaluate_network(network, self.sets, self.episodes)
        return point | {"real": {key: values.mean().item() for key, values in real.items()}}

    def _figures(self, network, shard) -> dict[str, float]:
        kept = None if shard.kept_tokens is None else shard.kept_tokens.long()
        features = extract_features(network, shard.pixels, kept=kept)
        episodes = sample_episodes(shard.labels, min(5, len(shard.labels.unique())), 1, 3, 60, seed=0)
        divergences, losses = [], []
        for one in episodes:
            prototypes = class_prototypes(features[one.support.flatten()], torch.arange(episodes.ways), episodes.ways)
            said = prototype_logits(features[one.query], prototypes, temperature=TEMPERATURE).log_softmax(1)
            ways = shard.labels[one.support[:, 0]]
            own = shard.teacher_logits[one.query][:, ways].float().log_softmax(1)
            losses.append(F.nll_loss(said, one.query_labels).item())
            divergences.append(F.kl_div(said, own, log_target=True, reduction="batchmean").item())
        return {
            "divergence": relational_divergence(features, shard.teacher_features.float()).item(),
            "episode error": 100 - prototype_accuracy(features, episodes).mean().item(),
            "episode loss": sum(losses) / len(losses),
            "episode KL": sum(divergences) / len(divergences),
        }


def summary(runs: dict[str, list[dict]]) -> dict:
    """How each figure goes with the mean gain on real images, over all points of the runs that learn by similarities
    alone, and of those that learn by episodes, too."""
    points = []
    for name, (start, *later) in runs.items():
        kind = "episodes" if "kl_weight" in RUNS[name] else "similarities"
        for point in later:
            gains = {key: point["real"][key] - start["real"][key] for key in start["real"]}
            figures = {figure: point[figure] - start[figure] for figure in FIGURES}
            mean = sum(gains.values()) / len(gains)
            points.append({"run": name, "kind": kind, "step": point["step"], "gain": mean, "gains": gains, **figures})
    kinds = {
        kind: _agreement([point for point in points if point["kind"] == kind]) for kind in ("similarities", "episodes")
    }
    return {"kinds": kinds, "points": points}


def _agreement(points: list[dict]) -> dict:
    found = {}
    for figure in FIGURES:
        rho, p = spearmanr([point[figure] for point in points], [-point["gain"] for point in points])
        better = [point["gain"] for point in points if point[figure] < 0]
        found[figure] = {
            "rank correlation": round(float(rho), 3),
            "p": float(p),
            "said to be better than the start": len(better),
            "and were": sum(gain > 0 for gain in better),
            "their mean gain": round(sum(better) / max(1, len(better)), 3),
        }
    truly = sum(point["gain"] > 0 for point in points)
    return {"points": len(points), "truly better": truly, "figures": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--surrogate", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--part", nargs=2, type=int, default=(0, 1), metavar=("I", "N"), help="every N-th from I on")
    args = parser.parse_args()
    pool = AdapterPool.from_pretrained(sorted(pool_path().iterdir()))
    unseen = sorted(i for group in pool.groups() for i in group[::4])
    taught = sorted(i for group in pool.groups() for i in group[1::4])
    teachers = pool.subset([i for i in range(len(pool)) if i not in unseen])
    surrogate = SurrogateDataset.from_pretrained(args.surrogate)
    backbone = pool.backbone
    sets = validation_sets(args.data, backbone.image_size, int(backbone.processor.resample), each=30)
    episodes = {(d.name, k): sample_episodes(d.labels, 5, k, 15, 600, seed=1) for d in sets for k in (1, 5)}
    (args.work / "stored").mkdir(parents=True, exist_ok=True)
    finished = {name: args.work / f"{i:02d}.json" for i, name in enumerate(RUNS)}
    first, parts = args.part
    for name, path in list(finished.items())[first::parts]:
        if not path.exists():
            config = DistillationConfig(**{**BASE, **RUNS[name]})
            look = Judge(
                surrogate, pool.subset(unseen), pool.subset(taught), sets, episodes, {config.steps // 3, config.steps}
            )
            trainer = MetaLoRATrainer(teachers, surrogate, config, [look])
            points = [look.look(trainer.student.backbone, 0)]
            stored = args.work / path.stem / "stored"
            if not stored.exists():  # what the teachers say is the same for many runs
                stored.parent.mkdir(exist_ok=True)
                stored.symlink_to((args.work / "stored").resolve())
            trainer.train(args.work / path.stem, progress=False)
            atomic_write(path, json.dumps(points + look.points).encode())
            print(name, *look.points, flush=True)
    if all(path.exists() for path in finished.values()):
        results = summary({name: json.loads(path.read_text()) for name, path in finished.items()})
        atomic_write(args.json, json.dumps(results, indent=1).encode())
        print(json.dumps(results["kinds"], indent=1))


if __name__ == "__main__":
    main()
