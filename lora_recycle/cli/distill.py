"""`lora-recycle distill`: surrogate images into one meta-LoRA."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..distillation.config import DistillationConfig
from ..errors import ConfigError
from .arguments import add_config_arguments, build_config
from .common import (
    Subparsers,
    add_dry_run_argument,
    add_json_argument,
    add_pool_arguments,
    add_resume_argument,
    check_json,
    echo_plan,
    hint,
    is_main_process,
    load_pool,
    note,
    notify_skipped,
    result,
    table,
    terminal_width,
)


if TYPE_CHECKING:
    from ..distillation.student import Student
    from ..pool.pool import AdapterPool
    from ..surrogate.dataset import SurrogateDataset


#: Share of the average's squared norm from which on a rank is not remarked upon.
ENOUGH_OF_AVERAGE = 0.9

EPILOG = """\
examples:
  lora-recycle distill demo --surrogate surrogate --output meta_lora
  lora-recycle distill pool --surrogate surrogate --output meta_lora --steps 1000 --rank 8
  lora-recycle distill pool --surrogate surrogate --output meta_lora --init zero --kl-weight 1 --interpolation-weight 1
  lora-recycle distill pool --surrogate surrogate --output meta_lora --report-to tensorboard
  lora-recycle distill pool --surrogate surrogate --output meta_lora --dry-run      what it would do and cost
  accelerate launch --num_processes 4 -m lora_recycle distill pool --surrogate surrogate --output meta_lora
  lora-recycle distill pool --output average --init average --steps 0      the exact average, without training
  lora-recycle distill pool --output merged --steps 0          the same, the largest domain at full strength

Run the same command again to resume a run that was interrupted.
"""


def add_parser(subparsers: Subparsers, **options: Any) -> argparse.ArgumentParser:
    summary = "distil surrogate images and their adapters into one meta-LoRA"
    parser = subparsers.add_parser("distill", help=summary, description=summary, epilog=EPILOG, **options)
    add_pool_arguments(parser)
    parser.add_argument(
        "--surrogate",
        metavar="DATA",
        help="surrogate data of these adapters: a folder or a repo id (org/name@revision)",
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="DIR",
        help="output folder for the meta-LoRA: new, empty, or one with an earlier meta-LoRA",
    )
    parser.add_argument(
        "--report-to",
        nargs="+",
        default=[],
        metavar="NAME",
        help="trackers to log every step to: tensorboard (writes DIR/work/trackers), wandb, mlflow ...",
    )
    add_json_argument(parser, "the losses")
    add_resume_argument(parser)
    add_dry_run_argument(parser)
    add_config_arguments(parser, DistillationConfig)
    return parser


def run(args: argparse.Namespace) -> None:
    config = build_config(args, DistillationConfig)
    if args.surrogate is None and config.steps > 0:
        raise ConfigError("distill needs --surrogate DIR, the output of invert, unless --steps is 0.")
    from ..adapters.sources import one_id
    from ..distillation.callbacks import Trackers
    from ..distillation.plan import plan_distillation
    from ..distillation.saving import save_meta_lora
    from ..distillation.trainer import MetaLoRATrainer
    from ..modeling.serialization import OUTPUT
    from ..reports.training_report import write_training_report
    from ..runtime.launch_checks import check_same
    from ..runtime.outputs import check_output, claim_output
    from ..surrogate.dataset import SurrogateDataset

    check_json(args, "meta_lora", "losses")
    check_output(args.output, OUTPUT)
    surrogate = None
    if args.surrogate:
        name, revision = one_id(args.surrogate)
        surrogate = SurrogateDataset.from_pretrained(name, revision=revision, progress=not args.quiet)
    pool = load_pool(args)
    if surrogate and args.on_error == "skip":
        pool = _with_images(pool, surrogate)
    adapters = [info.sha256 for info in pool.infos]
    shards = [entry["sha256"] for entry in surrogate.manifest["shards"]] if surrogate else []
    check_same(verb=args.verb, settings=config.to_dict(), adapters=adapters, surrogate=shards)
    if args.dry_run:
        echo_plan(plan_distillation(pool, surrogate, config))
        return
    folder = Path(args.output) / "work"
    callbacks = [Trackers(args.report_to, folder / "trackers")] if args.report_to else []
    trainer = MetaLoRATrainer(pool, surrogate, config, callbacks)
    if is_main_process():
        notify_skipped(trainer.excluded, len(trainer.pool))
        claim_output(args.output, OUTPUT)
    trainer.train(folder, progress=not args.quiet, resume=args.resume)
    if not is_main_process():
        return
    model = trainer.to_model()
    save_meta_lora(model, args.output)
    if trainer.history:
        report = write_training_report(Path(args.output) / "report.html", trainer, model.settings, args.output)
        if not args.quiet:
            note(f"Report: {report}")
    rows = [(name, *(float(f"{v:.4g}") for v in (values[0], values[-1]))) for name, values in trainer.history.items()]
    untrained = f"{args.output}: the initialisation, untrained"
    text = table(("loss", "first step", "last step"), rows, terminal_width(sys.stdout)) if rows else untrained
    losses = {name: {"first": first, "last": last} for name, first, last in rows}
    result(args, {"meta_lora": args.output, "best_step": trainer.selection.best_step, "losses": losses}, text)
    _notify_share(trainer.student)
    if trainer.selection.best_step:  # the trainer itself says so where the start is kept
        note(trainer.selection.verdict())
    if trainer.skipped:
        steps = ", ".join(map(str, trainer.skipped))
        note(f"{len(trainer.skipped)} of {config.steps} steps skipped because of spikes of the loss: {steps}")
    hint(f"lora-recycle evaluate {shlex.quote(args.output)} --data PATH --pool {shlex.join(args.pool)}")


def _notify_share(student: Student) -> None:
    """What the rank leaves of the average that the student started from, where that is not nearly all."""
    share = student.average_share(student.rank)
    if share < ENOUGH_OF_AVERAGE:
        higher = student.rank
        while student.average_share(higher) < ENOUGH_OF_AVERAGE:
            higher *= 2
        note(
            f"Rank {student.rank} holds only {share:.0%} of the squared norm of the average that it starts from; "
            f"--rank {higher} would hold {student.average_share(higher):.0%}."
        )


def _with_images(pool: AdapterPool, surrogate: SurrogateDataset) -> AdapterPool:
    """The adapters that have surrogate images: those that could not be inverted are reported and left out."""
    inverted = {entry["adapter"]["sha256"] for entry in surrogate.manifest["shards"]}
    kept = [i for i, info in enumerate(pool.infos) if info.sha256 in inverted]
    reason = f"{surrogate.folder} has no images of it"
    without = [(info.where, reason) for info in pool.infos if info.sha256 not in inverted]
    if is_main_process():
        notify_skipped(without, len(kept))
    return pool.subset(kept)
