"""`lora-recycle invert`: surrogate images from adapters."""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import Any

from ..inversion.config import InversionConfig
from ..runtime.terminal import counted
from .arguments import add_config_arguments, build_config
from .common import (
    Subparsers,
    add_class_names_argument,
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


#: Mean probability of the intended class below which an adapter's images are reported as doubtful.
LOW_CONFIDENCE = 0.5

EPILOG = """\
examples:
  lora-recycle invert demo --output surrogate
  lora-recycle invert pool --output surrogate --iterations 100 --priors tv=0.1 patch_entropy=0.05
  lora-recycle invert someone/vit-lora-birds@v1 pool --output surrogate --keep-ratio 0.5
  lora-recycle invert ids.txt collection:someone/vit-loras --on-error skip --output surrogate
  lora-recycle invert pool --output surrogate --starts images=1 --start-images my_photos
  lora-recycle invert someone/clip-lora --class-names cat,dog,fox --output surrogate
  lora-recycle invert someone/vit-lora --support photos --output surrogate      a head from photos/<class>/*.jpg
  lora-recycle invert pool --output surrogate --dry-run             what it would do, and how long it would take
  accelerate launch --num_processes 4 -m lora_recycle invert pool --output surrogate

Run the same command again to resume: finished shards are kept, damaged ones are rebuilt.
"""


def add_parser(subparsers: Subparsers, **options: Any) -> argparse.ArgumentParser:
    summary = "make surrogate images from adapters"
    parser = subparsers.add_parser("invert", help=summary, description=summary, epilog=EPILOG, **options)
    add_pool_arguments(parser)
    add_class_names_argument(parser)
    parser.add_argument("--prompt", metavar="TEXT", help="prompt for class names (default: 'a photo of a {}.')")
    parser.add_argument(
        "--support",
        metavar="PATH",
        help="labelled images, in class folders, that adapters without a head get one from",
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="DIR",
        help="output folder for the surrogate data: new, empty, or one with earlier surrogate data",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="dtype of the backbone (default: float32)")
    add_json_argument(parser, "the table")
    add_resume_argument(parser)
    add_dry_run_argument(parser)
    add_config_arguments(parser, InversionConfig)
    return parser


def run(args: argparse.Namespace) -> None:
    config = build_config(args, InversionConfig)
    import torch

    from ..adapters.zero_shot_heads import PROMPT
    from ..inversion.inverter import LoRAInverter
    from ..inversion.plan import plan_inversion
    from ..runtime.launch_checks import check_same
    from ..runtime.outputs import check_output
    from ..surrogate.dataset import OUTPUT

    check_json(args, "adapter", "confidence")
    check_output(args.output, OUTPUT)
    pool = load_pool(
        args,
        class_names=args.class_names,
        prompt=PROMPT if args.prompt is None else args.prompt,
        require_heads=True,
        support=args.support,
        dtype=getattr(torch, args.dtype) if args.dtype else None,
    )
    check_same(verb=args.verb, settings=config.to_dict(), adapters=[info.sha256 for info in pool.infos])
    inverter = LoRAInverter(pool, config)
    if args.dry_run:
        echo_plan(plan_inversion(inverter, args.output if args.resume else None))
        return
    surrogate = inverter.run(args.output, progress=not args.quiet, resume=args.resume)
    if not is_main_process():
        return
    failed = [(entry["name"], entry["reason"]) for entry in inverter.failed]
    notify_skipped(failed, surrogate.num_shards)
    shards = surrogate.manifest["shards"]
    rows = [(s["adapter"]["name"], s["num_images"], s["accuracy"], s["confidence"]) for s in shards]
    header = ("adapter", "images", "accuracy", "confidence")
    values = [dict(zip(header, row, strict=True)) for row in rows]
    result(args, values, table(header, rows, terminal_width(sys.stdout)))
    if low := [f"{name} ({score:.2f})" for name, _, _, score in rows if score < LOW_CONFIDENCE]:
        give = "gives its" if len(low) == 1 else "give their"
        note(
            f"{counted(len(low), 'adapter')} {give} own images a low probability: {', '.join(low)}. Raise "
            f"--iterations, or leave such adapters out with `distill --min-confidence {LOW_CONFIDENCE}`."
        )
    if not args.quiet:
        note(f"To see the images: lora-recycle inspect {shlex.quote(args.output)} --images")
    hint(f"lora-recycle distill {shlex.join(args.pool)} --surrogate {shlex.quote(args.output)} --output meta_lora")
