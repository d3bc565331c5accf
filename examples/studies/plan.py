"""How near plans come to the runs that they are for.

    OMP_NUM_THREADS=1 python examples/studies/plan.py --json docs/results/plan.json

The time that `plan_inversion` and `plan_distillation` tell, by the time that the runs take: the shipped pool with the
default recipe but fewer images and steps, and two random adapters of ViT-B/16 on very few images. By default both are
processor time, so that what else the machine does weighs on neither; `--clock wall` is for a machine of one's own.
Beside them the ETA of the bar after a tenth, a quarter and half of the training's steps, by what was then left.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from pathlib import Path


CLOCKS = {"processor": time.process_time, "wall": time.perf_counter}
SHAPES = ("tiny", "vit-b16")
#: Fewer adapters, images and steps than a run for use has, by shape.
INVERSION = {
    "tiny": {"images_per_class": 2},
    "vit-b16": {"images_per_class": 1, "max_classes": 6, "iterations": 8, "stop_at": 1.0},
}
DISTILLATION = {
    "tiny": {"steps": 40, "eval_steps": 10},
    "vit-b16": {"steps": 12, "eval_steps": 6, "rank": 8, "relational_batch": 8, "validation_fraction": 0.0},
}
ADAPTERS = {"tiny": 6, "vit-b16": 2}
PARTS = (0.1, 0.25, 0.5)


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="default: all")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="processor", help="default: %(default)s")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the rows")
    args = parser.parse_args(argv)
    from speed.measure import machine

    from lora_recycle.runtime import plans

    plans.clock = CLOCKS[args.clock]
    rows: list[dict] = []
    for shape in args.shapes:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pool = make_pool(shape, Path(folder))
            for row in (invert(shape, pool, Path(folder)), distil(shape, pool, Path(folder))):
                rows.append({"shape": shape, "clock": args.clock, **row})
                print(line(rows[-1]), flush=True)
                if args.json:
                    values = {"machine": machine(pool.backbone.device), "rows": rows}
                    args.json.write_text(json.dumps(values, indent=1) + "\n")
    return rows


def line(row: dict) -> str:
    left = "".join(f", {part}: {ratio:.2f}" for part, ratio in row.get("eta", {}).items())
    return (
        f"{row['shape']:8} {row['stage']:13} planned {row['planned']:7.1f} s, took {row['took']:7.1f} s: "
        f"{row['ratio']:.2f}; the plan itself took {row['planning']:.1f} s{left}"
    )


def make_pool(shape: str, folder: Path):
    """Shipped adapters, evenly spread, or random ones of ViT-B/16."""
    import torch
    from speed.stages import make_world

    from lora_recycle import AdapterPool
    from lora_recycle.hub.embedded import pool_path

    if shape == "tiny":
        pool = AdapterPool.from_pretrained(pool_path())
        return pool.subset(range(0, len(pool), len(pool) // ADAPTERS[shape])[: ADAPTERS[shape]])
    torch.manual_seed(0)
    world = make_world(shape, torch.device("cpu"), torch.float32, folder)
    for parameter in world.teacher.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.01)
    world.teacher.save_pretrained(folder / "other")
    return AdapterPool.from_pretrained([folder / "adapter", folder / "other"], backbone=world.backbone)


def invert(shape: str, pool, folder: Path) -> dict:
    from lora_recycle import InversionConfig, LoRAInverter, plan_inversion
    from lora_recycle.runtime import plans

    inverter = LoRAInverter(pool, InversionConfig(**INVERSION[shape]))
    begun = plans.clock()
    plan = plan_inversion(inverter)
    planned = plans.clock()
    inverter.run(folder / "surrogate", progress=False)
    return compare("inversion", plan, planned - begun, plans.clock() - planned)


def distil(shape: str, pool, folder: Path) -> dict:
    from lora_recycle import DistillationConfig, MetaLoRATrainer, SurrogateDataset, plan_distillation
    from lora_recycle.distillation.callbacks import TrainerCallback
    from lora_recycle.runtime import plans

    times = []

    class Clock(TrainerCallback):
        def on_train_begin(self, trainer, step):
            times.append(plans.clock())

        def on_step_end(self, trainer, step):
            times.append(plans.clock())

        def on_train_end(self, trainer):
            times.append(plans.clock())

    config, surrogate = (
        DistillationConfig(**DISTILLATION[shape]),
        SurrogateDataset.from_pretrained(folder / "surrogate"),
    )
    begun = plans.clock()
    plan = plan_distillation(pool, surrogate, config)
    planned = plans.clock()
    trainer = MetaLoRATrainer(pool, surrogate, config, [Clock()])
    trainer.train(folder / "work", progress=False)
    trainer.to_model()
    took, eta = plans.clock() - planned, {}
    for part in PARTS:
        done = max(1, round(part * config.steps))
        left = (times[done] - times[0]) / done * (config.steps - done)
        eta[f"eta at {part:.0%}"] = left / (times[-1] - times[done])
    return compare("distillation", plan, planned - begun, took) | {"eta": eta}


def compare(stage: str, plan, planning: float, took: float) -> dict:
    stages = {row.name: row.seconds for row in plan.stages}
    result = {"stage": stage, "planned": plan.seconds, "took": took, "ratio": plan.seconds / took}
    return result | {"planning": planning, "stages": stages, "gflops": plan.gflops}


if __name__ == "__main__":
    main()
