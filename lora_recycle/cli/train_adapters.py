"""`lora-recycle train-adapters`: adapters with heads from any labelled data set."""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import Any

from ..pool.config import AdapterTrainingConfig
from ..runtime.terminal import counted
from .arguments import add_config_arguments, build_config
from .common import (
    Subparsers,
    add_data_arguments,
    add_device_argument,
    add_json_argument,
    check_json,
    checked_device,
    columns,
    hint,
    is_main_process,
    note,
    notify_failures,
    result,
    table,
    terminal_width,
)


EPILOG = """\
examples:
  lora-recycle train-adapters photos --output pool                          folders photos/cat, photos/dog, ...
  lora-recycle train-adapters cifar.parquet --output pool --tasks 20 --classes 15 --rank 4
  lora-recycle train-adapters characters --output pool --targets q_proj,v_proj --no-flip
  lora-recycle train-adapters photos --output pool --base-model facebook/dinov2-small --peft-type DORA

Run the same command again to resume: finished adapters are kept.
"""


def add_parser(subparsers: Subparsers, **options: Any) -> argparse.ArgumentParser:
    summary = "train adapters with heads on a labelled data set"
    parser = subparsers.add_parser("train-adapters", help=summary, description=summary, epilog=EPILOG, **options)
    parser.add_argument(
        "data",
        metavar="DATA",
        help="labelled images: a parquet or CSV file, a data set folder, a folder of class folders or a Hub id",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="output folder, with a folder for each adapter")
    parser.add_argument(
        "--base-model",
        default="demo",
        metavar="X",
        help="base model: a folder, a repo id, or demo (default: %(default)s)",
    )
    add_json_argument(parser, "the accuracies")
    add_data_arguments(parser)
    add_device_argument(parser)
    add_config_arguments(parser, AdapterTrainingConfig)
    return parser


def run(args: argparse.Namespace) -> None:
    config = build_config(args, AdapterTrainingConfig)
    from accelerate.utils import gather_object

    from ..pool.training import train_adapters

    check_json(args, "adapter", "accuracy")
    device = checked_device(args.device)
    failures: dict[int, str] | None = {} if args.skip_errors else None
    reading: Any = {"columns": columns(args), "failures": failures}
    made = train_adapters(args.data, args.output, config, args.base_model, device, not args.quiet, **reading)
    made = sorted(gather_object(made), key=lambda row: row["adapter"])
    if not is_main_process():
        return
    notify_failures(failures)
    rows = [(row["adapter"], row["accuracy"], row["frozen_prototypes"]) for row in made]
    header = ("adapter", "validation accuracy", "frozen prototypes")
    result(args, made, table(header, rows, terminal_width(sys.stdout)))
    if kept := config.tasks - len(made):
        note(f"{counted(kept, 'adapter')} existed already and {'was' if kept == 1 else 'were'} kept.")
    behind = sum(row["accuracy"] <= row["frozen_prototypes"] for row in made)
    if behind:
        several = f"{behind} of {counted(len(made), 'adapter')} {'is' if behind == 1 else 'are'}"
        note(f"{several} no better than the frozen backbone. Use more --epochs or images.")
    hint(f"lora-recycle invert {shlex.quote(args.output)} --output surrogate")
