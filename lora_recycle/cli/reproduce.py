"""`lora-recycle reproduce`: a meta-LoRA made again from its sidecar, and compared."""

from __future__ import annotations

import argparse
from typing import Any

from .common import (
    META_LORA_HELP,
    POOL_HELP,
    Subparsers,
    add_device_argument,
    add_json_argument,
    check_json,
    note,
    result,
    sources,
    table,
)


EPILOG = """\
examples:
  lora-recycle reproduce someone/meta-lora                    its adapters are downloaded at the recorded commits
  lora-recycle reproduce meta_lora pool                       its adapters came from folders, now in pool
  lora-recycle reproduce meta_lora pool --surrogate surrogate  without inverting the adapters again

The exit code is 0 if the weights are identical byte for byte, else 1. This can be expected only with the same versions
on the same kind of machine; differences of these are listed.
"""


def add_parser(subparsers: Subparsers, **options: Any) -> argparse.ArgumentParser:
    summary = "rebuild a meta-LoRA from its sidecar and compare"
    parser = subparsers.add_parser("reproduce", help=summary, description=summary, epilog=EPILOG, **options)
    parser.add_argument("model", metavar="META_LORA", help=META_LORA_HELP)
    parser.add_argument(
        "pool", nargs="*", metavar="POOL", help=f"where its adapters are, if they came from folders; {POOL_HELP}"
    )
    parser.add_argument(
        "--surrogate",
        metavar="DATA",
        help="its surrogate data, a folder or a repo id (default: invert the adapters again)",
    )
    parser.add_argument(
        "--output", default="runs/reproduced", metavar="DIR", help="output folder (default: %(default)s)"
    )
    add_json_argument(parser, "the comparison")
    add_device_argument(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    from ..distillation.reproduction import reproduce
    from .common import checked_device

    check_json(args, "folder", "identical")
    made = reproduce(
        args.model,
        args.output,
        pool=sources(args.pool),
        surrogate=args.surrogate,
        device=checked_device(args.device),
        progress=not args.quiet,
    )
    if made.shards is not None:
        note("surrogate data: {} of {} shards byte-identical".format(*made.shards))
    if made.conditions:
        note(table(("differs", "recorded", "here"), made.conditions))
    far = f"not byte-identical; weights differ by up to {made.max_difference:.3g}"
    values = {"folder": made.folder, "identical": made.identical, "max_difference": made.max_difference}
    result(args, values, f"{made.folder}: {'byte-identical' if made.identical else far}")
    return 0 if made.identical else 1
