"""One study for each figure of the ablations: what the meta-LoRA owes to each choice.

    python examples/studies/ablations.py --list                                 the studies, and their minutes
    python examples/studies/ablations.py --study rank --data DATA --work runs/ablations \\
        --json docs/results/ablation-rank.json
    python examples/studies/ablations.py --plot docs/results/ablation-rank.json    draws it again

Each point of a study changes one thing against `BASE`: 8 embedded adapters, inverted and distilled as below, from zero
(where all that is gained comes from the surrogate images) and from the average (as the default does). 5-way, 600
episodes, 1 and 5 shots, paired with the frozen backbone and with the exact average of the same adapters. Surrogate
images that several points share are made once. DATA holds `<set>/<split>.parquet`. Finished points are kept in the
work folder when it is run again; two shells share a study with `--part 0 2` and `--part 1 2`. Nothing is chosen here,
so the test classes are read; `--split validation` looks at the others. With `--device cuda` all takes minutes.
"""

import argparse
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from ablation_plots import draw
from common import BASE_INVERT, FROM_INIT

from lora_recycle import AdapterPool, DistillationConfig, InversionConfig, LoRAInverter, MetaLoRATrainer
from lora_recycle.backbones.backbone import extract_features
from lora_recycle.evaluation.results import confidence
from lora_recycle.fewshot.accuracy import prototype_accuracy
from lora_recycle.fewshot.episodes import sample_episodes
from lora_recycle.hub.embedded import pool_path
from lora_recycle.images.labelled import load_labelled_images
from lora_recycle.pool.config import AdapterTrainingConfig
from lora_recycle.pool.training import train_adapters
from lora_recycle.runtime.files import atomic_write
from lora_recycle.runtime.launch import choose_device
from lora_recycle.surrogate.dataset import SurrogateDataset


HOME = ("cifar_fs", "mini_imagenet", "vgg_flower", "omniglot_small")
EIGHT = tuple(f"cifar_fs-{i:02d}" for i in range(5, 13))
BASE_DISTILL = {"rank": 16, "lr": 1e-3, "steps": 60, "relational_batch": 64, "init": "undiluted", **FROM_INIT}
EPISODIC = {"relational_weight": 0, "queries": 1}


@dataclasses.dataclass(frozen=True)
class Point:
    """One value of what a study changes.

    Args:
        name: as the table and the axis say it.
        adapters: names of embedded adapters.
        tuned: settings of adapters that are tuned for it, in place of embedded ones; DATA's cifar_fs/train gives the
            images.
        sets: data sets that it is judged on.
        test: (ways, shots) of the episodes that it is judged on.
    """

    name: str
    invert: dict[str, Any] = dataclasses.field(default_factory=dict)
    distill: dict[str, Any] = dataclasses.field(default_factory=dict)
    adapters: tuple[str, ...] = EIGHT
    tuned: dict[str, Any] | None = None
    sets: tuple[str, ...] = ("cifar_fs",)
    test: tuple[tuple[int, int], ...] = ((5, 1), (5, 5))

    def config(self) -> tuple[InversionConfig, DistillationConfig]:
        return InversionConfig(**{**BASE_INVERT, **self.invert}), DistillationConfig(
            validation_fraction=0.0, **{**BASE_DISTILL, **self.distill}
        )

    def minutes(self) -> float:
        """On one core of the machine that made docs/results/efficiency.json, with the shipped backbone."""
        invert, distill = self.config()
        images = len(self.adapters) * min(invert.max_classes, 10) * invert.images_per_class
        episodes = distill.ways * (distill.shots + distill.queries) * distill.episodes
        batch = distill.relational_batch * bool(distill.relational_weight)
        batch += episodes * (bool(distill.kl_weight) + bool(distill.interpolation_weight))
        tuning = 0 if self.tuned is None else len(self.adapters) * self.tuned["epochs"] * 600 * 0.02
        judging = 800 * len(self.sets) * 4 * 0.015
        return (
            images * invert.iterations * 0.0155
            + 2 * distill.steps * batch * 0.017 * invert.keep_ratio
            + tuning
            + judging
        ) / 60


def _one_of_each(count: int) -> tuple[str, ...]:
    return tuple(f"{name}-{i:02d}" for i in range(1, 1 + count) for name in HOME)


def _episodes(ways: int, shots: int) -> Point:
    distill = {**EPISODIC, "kl_weight": 1, "interpolation_weight": 1, "ways": ways, "shots": shots, "queries": 3}
    tests = ((5, 1), (5, 5), (10, 1), (10, 5))
    return Point(f"{ways}-way {shots}-shot", {"images_per_class": 8, "max_classes": 10}, distill, test=tests)


def _shares(share: float) -> Point:
    distill = {**EPISODIC, "kl_weight": 1 - share, "interpolation_weight": share}
    return Point(f"{share:.0%}", distill=distill, adapters=_one_of_each(2), sets=HOME)


def _counts(name: str, images: int, queries: int, loss: str) -> Point:
    """What a loss teaches from so many images a class, masked and stopped early as by default, at home."""
    episodes = {"relational_weight": 0, "kl_weight": 1, "interpolation_weight": 1, "queries": queries}
    distill = {"similarities": {}, "episodes": episodes}[loss]
    label = f"{images} images" + (f", {queries} queries" if loss != "similarities" else "") + f": {loss}"
    invert = {"images_per_class": images, "keep_ratio": 0.25, "stop_at": 0.95}
    own = tuple(f"{name}-{i:02d}" for i in range(1, 6))
    return Point(f"{name}, {label}", invert, distill, adapters=own, sets=(name,))


#: name: (what its axis says, its points)
STUDIES: dict[str, tuple[str, list[Point]]] = {
    "adapters": (
        "number of LoRAs",
        [Point(str(n), adapters=tuple(f"cifar_fs-{i:02d}" for i in range(n))) for n in (1, 2, 4, 8, 14)],
    ),
    "tuned": (
        "epochs that the LoRAs were tuned for",
        [
            Point(str(n), tuned={"tasks": 4, "classes": 10, "images_per_class": 60, "epochs": n}, adapters=EIGHT[:4])
            for n in (1, 2, 4, 8)
        ],
    ),
    "mixed": (
        "LoRAs of cifar_fs and of mini_imagenet, vgg_flower, omniglot_small",
        [
            Point("8+0+0+0", sets=HOME),
            Point("5+1+1+1", adapters=(*EIGHT[:5], *_one_of_each(1)[1:]), sets=HOME),
            Point("4+4+0+0", adapters=(*EIGHT[:4], *(f"mini_imagenet-{i:02d}" for i in range(5, 9))), sets=HOME),
            Point("2+2+2+2", adapters=_one_of_each(2), sets=HOME),
            Point("4+4+4+4", adapters=_one_of_each(4), sets=HOME),
        ],
    ),
    "rank": ("rank of the meta-LoRA", [Point(str(n), distill={"rank": n}) for n in (2, 4, 8, 16, 32, 64)]),
    "images": ("images of each class", [Point(str(n), {"images_per_class": n}) for n in (1, 2, 4, 8, 16)]),
    "iterations": ("iterations of inversion", [Point(str(n), {"iterations": n}) for n in (0, 10, 30, 100, 300)]),
    "prior": (
        "prior of inversion",
        [
            Point("none", {"priors": {}}),
            Point("total variation"),
            Point("patch entropy", {"priors": {"patch_entropy": 0.1}}),
            Point("batch norm of a CNN", {"priors": {"batch_norm": 232}}),  # 0.01 of the plain sum
            Point("total variation, batch norm", {"priors": {"tv": 0.1, "batch_norm": 232}}),
        ],
    ),
    "keep": (
        "patches masked",
        [Point(f"{1 - keep:.0%}", {"keep_ratio": keep}) for keep in (1.0, 0.75, 0.5, 0.25)],
    ),
    "loss": (
        "loss",
        [
            Point("KL", distill={**EPISODIC, "kl_weight": 1}),
            Point("cross-entropy", distill={**EPISODIC, "interpolation_weight": 1}),
            Point("KL, cross-entropy", distill={**EPISODIC, "kl_weight": 1, "interpolation_weight": 1}),
            Point("relational"),
            Point("all three", distill={"queries": 1, "kl_weight": 1, "interpolation_weight": 1}),
        ],
    ),
    "counts": (
        "images of each class, queries of an episode, loss",
        [
            _counts("vgg_flower", 6, 5, "episodes"),
            _counts("vgg_flower", 6, 1, "similarities"),
            _counts("cifar_fs", 6, 5, "episodes"),
        ],
    ),
    "interpolation": ("share of interpolated episodes", [_shares(share) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]),
    "episodes": (
        "episodes of meta-training",
        [_episodes(*kind) for kind in ((5, 1), (5, 5), (10, 1), (2, 1))],
    ),
    "domain": (
        "pool",
        [
            *(Point(name, adapters=tuple(f"{name}-{i:02d}" for i in range(1, 6)), sets=HOME) for name in HOME),
            Point("mixed", adapters=_one_of_each(5), sets=HOME),
        ],
    ),
}


class Lab:
    """Everything that points share: images, episodes, pools, surrogate images."""

    def __init__(
        self,
        data: Path,
        work: Path,
        split: str,
        episodes: int = 600,
        max_per_class: int = 40,
        device: torch.device | None = None,
    ):
        self.data, self.work, self.split, self.device = data, work, split, device
        self.episodes, self.max_per_class = episodes, max_per_class
        self._images: dict[str, Any] = {}
        self._frozen: dict[str, list[float]] = {}

    def images(self, name: str, backbone):
        if name not in self._images:
            path = self.data / name / f"{self.split}.parquet"
            size, resample = backbone.image_size, int(backbone.processor.resample)
            self._images[name] = load_labelled_images(path, size, resample, self.max_per_class)
        return self._images[name]

    def pool(self, point: Point) -> AdapterPool:
        if point.tuned is None:
            return AdapterPool.from_pretrained([pool_path() / name for name in point.adapters], device=self.device)
        folder = self.work / f"pool-{_digest(point.tuned)}"
        train_adapters(
            self.data / "cifar_fs" / "train.parquet", folder, AdapterTrainingConfig(**point.tuned), device=self.device
        )
        return AdapterPool.from_pretrained(folder, device=self.device)

    def surrogate(self, pool: AdapterPool, config: InversionConfig) -> SurrogateDataset:
        """Made once for all points that want the same; goes on after a kill."""
        folder = self.work / f"surrogate-{_digest([config.to_dict(), [info.sha256 for info in pool.infos]])}"
        return LoRAInverter(pool, config).run(folder)

    def judge(self, network, point: Point) -> dict[str, list[float]]:
        """Per-episode accuracies by "<set> <ways>-way <shots>-shot"."""
        found = {}
        for name in point.sets:
            data = self.images(name, network)
            features = extract_features(network, data.pixels)
            for ways, shots in point.test:
                drawn = sample_episodes(data.labels, ways, shots, 15, self.episodes, seed=0)
                found[f"{name} {ways}-way {shots}-shot"] = prototype_accuracy(features, drawn).tolist()
        return found

    def frozen(self, backbone, point: Point) -> dict[str, list[float]]:
        """`judge` of the bare backbone, which is the same for all points."""
        missing = tuple(name for name in point.sets if not any(task.startswith(f"{name} ") for task in self._frozen))
        self._frozen |= self.judge(backbone, dataclasses.replace(point, sets=missing))
        return {task: values for task, values in self._frozen.items() if task.split(" ")[0] in point.sets}

    def run(self, point: Point) -> dict[str, Any]:
        """Accuracies of the frozen backbone, the average, and the meta-LoRAs from zero and from the average."""
        invert, distill = point.config()
        pool = self.pool(point)
        surrogate, found = self.surrogate(pool, invert), {"frozen": self.frozen(pool.backbone, point)}
        with pool.folded() as averaged:
            found["average"] = self.judge(averaged, point)
        for init in ("zero", "average"):
            trainer = MetaLoRATrainer(pool, surrogate, dataclasses.replace(distill, init=init))
            found[f"from {init}"] = self.judge(trainer.train().backbone, point)
        return found


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def summary(study: str, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Per point and task: mean with 95% interval, and the paired differences to `frozen` and to `average`."""
    points = []
    for name, methods in found.items():
        tasks = {}
        for task in methods["frozen"]:
            values = {method: torch.tensor(result[task]) for method, result in methods.items()}
            tasks[task] = {
                method: {
                    "accuracy": confidence(own),
                    "vs frozen": confidence(own - values["frozen"]),
                    "vs average": confidence(own - values["average"]),
                }
                for method, own in values.items()
            }
        points.append({"name": name, "tasks": tasks})
    return {"study": study, "axis": STUDIES[study][0], "points": points}


def run_study(study: str, lab: Lab, part: tuple[int, int] = (0, 1)) -> dict[str, Any] | None:
    """The summary, or None where points are left to another part."""
    found, points = {}, STUDIES[study][1]
    for number, point in enumerate(points):
        settings = [dataclasses.asdict(point), BASE_INVERT, BASE_DISTILL, lab.split, lab.episodes, lab.max_per_class]
        path = lab.work / f"{study}-{number:02d}-{_digest(settings)}.json"
        if not path.is_file() and number % part[1] == part[0]:
            atomic_write(path, json.dumps(lab.run(point)).encode())
        if path.is_file():
            found[point.name] = json.loads(path.read_text())
    return summary(study, found) if len(found) == len(points) else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--list", action="store_true", help="print the studies and their minutes")
    what.add_argument("--study", choices=list(STUDIES))
    what.add_argument("--plot", type=Path, metavar="JSON", help="draw the figure of a finished study")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--split", default="test", choices=("test", "validation"))
    parser.add_argument("--part", nargs=2, type=int, default=(0, 1), metavar=("I", "N"), help="every N-th from I on")
    parser.add_argument("--device", help="as torch names it")
    args = parser.parse_args()
    if args.list:
        for name, (axis, points) in STUDIES.items():
            print(f"{name:14} {sum(point.minutes() for point in points):5.0f} min  {axis}: ", end="")
            print(", ".join(point.name for point in points))
    elif args.plot:
        draw(json.loads(args.plot.read_text()), args.plot.with_suffix(".svg"))
    else:
        if args.data is None or args.json is None:
            parser.error("--study needs --data and --json")
        torch.set_num_threads(1)
        lab = Lab(args.data, args.work, args.split, device=choose_device(args.device))
        result = run_study(args.study, lab, tuple(args.part))
        if result is not None:
            atomic_write(args.json, json.dumps(result, indent=1).encode())
            draw(result, args.json.with_suffix(".svg"))


if __name__ == "__main__":
    main()
