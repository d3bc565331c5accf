"""`lora-recycle train-adapters`: adapters with heads from any labelled data set."""

from __future__ import annotations

import argparse
import shlex
from typing import Any

from ..pool.config import AdapterTrainingConfig
from .arguments import add_config_arguments, build_config
from .common import Subparsers, add_device_argument, checked_device, echo, hint, is_main_process, note, table


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
        help="labelled images: a parquet file, a data set folder, a folder of class folders or a Hub id",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="output folder, with a folder for each adapter")
    parser.add_argument(
        "--base-model",
        default="demo",
        metavar="X",
        help="base model: a folder, a repo id, or demo (default: %(default)s)",
    )
    add_device_argument(parser)
    add_config_arguments(parser, AdapterTrainingConfig)
    return parser


def run(args: argparse.Namespace) -> None:
    config = build_config(args, AdapterTrainingConfig)
    from accelerate.utils import gather_object

    from ..pool.training import train_adapters

    device = checked_device(args.device)
    made = train_adapters(args.data, args.output, config, args.base_model, device, progress=not args.quiet)
    made = sorted(gather_object(made), key=lambda result: result["adapter"])
    if not is_main_process():
        return
    rows = [(result["adapter"], result["accuracy"], result["frozen_prototypes"]) for result in made]
    echo(table(("adapter", "validation accuracy", "frozen prototypes"), rows))
    if len(made) < config.tasks:
        note(f"{config.tasks - len(made)} adapters existed already and were kept.")
    behind = sum(result["accuracy"] <= result["frozen_prototypes"] for result in made)
    if behind:
        note(f"{behind} of {len(made)} adapters are no better than the frozen backbone. Use more --epochs or images.")
    hint(f"lora-recycle invert {shlex.quote(args.output)} --output surrogate")
