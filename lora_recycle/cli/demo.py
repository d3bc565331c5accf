"""`lora-recycle demo`: all steps, from the shipped adapters to a meta-LoRA that is evaluated on real images."""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import Any

from .common import (
    Subparsers,
    add_device_argument,
    add_json_argument,
    check_json,
    checked_device,
    hint,
    note,
    result,
    terminal_width,
)


EPILOG = """\
examples:
  lora-recycle demo                                      a few minutes on two cores, no network
  lora-recycle demo --data photos --data test.parquet    evaluate on your images as well
  lora-recycle demo --pool pool --recipe my_recipe.yaml --output runs/mine

Run the same command again to resume.
"""


def add_parser(subparsers: Subparsers, **options: Any) -> argparse.ArgumentParser:
    summary = "run all steps on the shipped adapters, and evaluate on real images"
    parser = subparsers.add_parser("demo", help=summary, description=summary, epilog=EPILOG, **options)
    parser.add_argument("--output", default="runs/demo", metavar="DIR", help="output folder (default: %(default)s)")
    parser.add_argument(
        "--data", nargs="+", action="extend", default=[], metavar="PATH", help="more labelled images to evaluate on"
    )
    parser.add_argument("--recipe", metavar="FILE", help="YAML file with the sections invert and distill")
    parser.add_argument("--pool", metavar="FOLDER", help="adapters to recycle (default: the shipped ones)")
    add_json_argument(parser, "the results")
    add_device_argument(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    from ..demo.run import run_demo
    from ..evaluation.results import format_table

    pool = None if args.pool == "demo" else args.pool
    device = checked_device(args.device)
    check_json(args, "rows", "meta_lora")
    made = run_demo(args.output, data=args.data, recipe=args.recipe, pool=pool, device=device, progress=not args.quiet)
    values = {"rows": made.rows, "meta_lora": made.meta_lora, "report": made.report}
    result(args, values, format_table(made.rows, terminal_width(sys.stdout)))
    for remark in made.notes:
        note(remark)
    note(f"Report: {made.report}\nUse the new meta-LoRA from Python:\n\n{made.usage}")
    hint(f"lora-recycle predict {shlex.quote(str(made.meta_lora))} --support FOLDER_OF_CLASS_FOLDERS IMAGES...")
