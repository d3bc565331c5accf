"""The whole way as a user goes it, adapters in, meta-LoRA out, stage by stage; and what other ways would take.

Seconds and processor time of each stage are measured. The published procedure is a plan: three of its steps on this
machine, times their number. So is the plain loop of `baselines.py` with the recipe's own counts: three of its steps.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch

from lora_recycle import (
    AdapterPool,
    DistillationConfig,
    EvaluationConfig,
    InversionConfig,
    LoRAInverter,
    MetaLoRATrainer,
    evaluate,
    plan_distillation,
    plan_inversion,
    save_meta_lora,
)
from lora_recycle.demo.run import load_digits_images
from lora_recycle.distillation.callbacks import TrainerCallback
from lora_recycle.hub.embedded import pool_path
from lora_recycle.images.labelled import load_labelled_images
from lora_recycle.runtime.plans import peak_memory, seconds_of
from lora_recycle.surrogate.dataset import SurrogateDataset

from . import baselines
from .stages import make_world


#: The paper's: every pixel by itself, whole images for all iterations, an episode of one and of several adapters each
#: step, no relations, no stored teachers, no mix with an average.
PUBLISHED_INVERSION = {
    "iterations": 2000,
    "stop_at": 1.0,
    "parameterization": "pixels",
    "starts": {"noise": 1.0},
    "flip": True,
    "keep_ratio": 1.0,
}
PUBLISHED_DISTILLATION = {
    "init": "zero",
    "share": 1.0,
    "experts": False,
    "relational_weight": 0.0,
    "kl_weight": 1.0,
    "interpolation_weight": 1.0,
    "episodes": 1,
    "use_masks": False,
    "validation_fraction": 0.0,
    "schedule": "cyclic",
}


@dataclasses.dataclass
class Clock:
    """Seconds, processor seconds and the largest memory of the process so far, by stage."""

    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    _since: tuple[float, float] = (0.0, 0.0)

    def start(self) -> None:
        self._since = time.perf_counter(), time.process_time()

    def ends(self, name: str) -> None:
        """The stage that ran since the last call."""
        seconds, processor = time.perf_counter() - self._since[0], time.process_time() - self._since[1]
        peak = peak_memory(torch.device("cpu")) / 1e6
        self.rows.append({"name": name, "seconds": seconds, "processor_seconds": processor, "peak_mb": peak})
        self.start()


class _TeachersEnd(TrainerCallback):
    """Ends the stage before the first step."""

    def __init__(self, clock: Clock):
        self.clock = clock

    def on_train_begin(self, trainer, step) -> None:
        self.clock.ends("teachers")


def end_to_end(
    folder: Path,
    adapters: int | None = None,
    inversion: dict[str, Any] | None = None,
    distillation: dict[str, Any] | None = None,
    data: Path | None = None,
    episodes: int = 600,
) -> dict[str, Any]:
    """Every stage of the shipped pool's default recipe, and the accuracy of what comes out.

    Args:
        folder: new or empty; the run's own files go there.
        adapters: as many of the pool, evenly spread; all by default.
        inversion, distillation: settings that differ from the defaults, for small runs.
        data: labelled images to evaluate on; scikit-learn's handwritten digits by default.
    """
    clock, first, second = Clock(), InversionConfig(**inversion or {}), DistillationConfig(**distillation or {})
    clock.start()
    pool = AdapterPool.from_pretrained(pool_path())
    if adapters is not None:
        pool = pool.subset(torch.linspace(0, len(pool) - 1, adapters).round().long().tolist())
    clock.ends("pull and check")
    pool.groups()
    clock.ends("groups")
    surrogate = LoRAInverter(pool, first).run(folder / "surrogate", progress=False)
    clock.ends("inversion")
    trainer = MetaLoRATrainer(pool, surrogate, second, [_TeachersEnd(clock)])
    clock.ends("start")
    trainer.train(folder / "work", progress=False)
    clock.ends("distillation and validation")
    model = trainer.to_model()
    save_meta_lora(model, folder / "meta_lora")
    clock.ends("saving")
    size, resample = pool.backbone.image_size, int(pool.backbone.processor.resample)
    images = load_digits_images(size, resample) if data is None else load_labelled_images(data, size, resample)
    rows = evaluate(images, model, EvaluationConfig(episodes=episodes, methods=("average",)), pool=pool).rows
    clock.ends("evaluation")  # of the product: not part of the way
    way = [row for row in clock.rows if row["name"] != "evaluation"]
    total = {key: sum(row[key] for row in way) for key in ("seconds", "processor_seconds")}
    return {
        "setting": {"adapters": len(pool), "inversion": first.to_dict(), "distillation": second.to_dict()},
        "stages": clock.rows,
        "total": total | {"peak_mb": max(row["peak_mb"] for row in way)},
        "accuracy": [{key: row[key] for key in ("method", "data", "shots", "accuracy", "ci95")} for row in rows],
        "published": published(pool, surrogate, first, second),
        "plain": plain(folder / "plain", len(pool), surrogate, first, second),
    }


def published(
    pool: AdapterPool, surrogate: SurrogateDataset, first: InversionConfig, second: DistillationConfig
) -> dict[str, float]:
    """Seconds of the published settings with as many images and steps, from three of their steps."""
    counts = {"images_per_class": first.images_per_class, "max_classes": first.max_classes}
    one = plan_inversion(LoRAInverter(pool, InversionConfig(**counts, **PUBLISHED_INVERSION)))
    # an episode has no more images of a class than there are
    queries = min(second.queries, first.images_per_class - 1)
    kept = {"steps": second.steps, "rank": second.rank, "ways": second.ways, "shots": second.shots}
    settings = {**kept, "queries": queries, **PUBLISHED_DISTILLATION}
    two = plan_distillation(pool, surrogate, DistillationConfig(**settings))
    return {"inversion": one.seconds, "distillation": two.seconds, "seconds": one.seconds + two.seconds}


def plain(
    folder: Path, adapters: int, surrogate: SurrogateDataset, first: InversionConfig, second: DistillationConfig
) -> dict[str, float]:
    """Seconds of the plain loop on random weights of the same shape: as many iterations of all images, and steps of as
    many images, from three steps of each."""
    device = torch.device("cpu")
    folder.mkdir()
    world = make_world("tiny", device, torch.float32, folder)
    count = min(first.batch_size, len(surrogate) // surrogate.num_shards)
    labels = torch.arange(count) % 10
    starts = torch.rand(count, 3, *(world.backbone.image_size,) * 2)
    step = baselines.inversion_step(world.teacher, starts, labels, world.autocast)
    inverting = seconds_of(step, device) / count * len(surrogate) * first.iterations
    images, classes = world.pixels(100), torch.arange(100) % 10
    order = classes.argsort(stable=True).view(10, 10)  # images of each class
    number = max(1, round(second.relational_batch / (second.ways * (second.shots + second.queries))))

    def draw() -> list[tuple[torch.Tensor, torch.Tensor]]:
        chosen = [order[torch.randperm(10)[: second.ways]] for _ in range(number)]
        return [(rows[:, : second.shots], rows[:, second.shots : second.shots + second.queries]) for rows in chosen]

    student = baselines.wearing(world.bare().model)
    step = baselines.distillation_step(student, world.teacher, images, classes, draw, world.autocast)
    learning = seconds_of(step, device) * second.steps
    return {"inversion": inverting, "distillation": learning, "seconds": inverting + learning}


def text(result: dict[str, Any]) -> str:
    """The stages, the total, the accuracies, and how many times longer the other ways take."""
    total = result["total"]
    rows = [*result["stages"], {"name": "total but evaluation", **total}]
    lines = [f"{'stage':28} {'seconds':>9} {'processor s':>12} {'peak MB':>9}  (so far)"]
    lines += [f"{r['name']:28} {r['seconds']:9.1f} {r['processor_seconds']:12.1f} {r['peak_mb']:9.0f}" for r in rows]
    lines += [
        f"{r['method']} on {r['data']}, {r['shots']} shots: {r['accuracy']:.1f} ± {r['ci95']:.1f}%"
        for r in result["accuracy"]
    ]
    for name in ("published", "plain"):
        other = result[name]
        lines.append(
            f"{name}, extrapolated from three steps: inversion {other['inversion']:.0f} s, distillation "
            f"{other['distillation']:.0f} s, {other['seconds'] / total['seconds']:.1f} times the total"
        )
    return "\n".join(lines)
