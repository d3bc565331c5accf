"""`lora-recycle extract`: what was tuned in a whole checkpoint, as a plain PEFT adapter."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from typing import Any

from .common import (
    Subparsers,
    add_base_model_argument,
    add_device_argument,
    add_json_argument,
    check_json,
    checked_device,
    hint,
    result,
)


EPILOG = """\
examples:
  lora-recycle extract someone/vit-finetuned-food --output lora
  lora-recycle extract runs/food/checkpoint-500 --base-model google/vit-base-patch16-224-in21k --rank 32 --output lora
  lora-recycle extract someone/vit-finetuned-food --energy 0.9 --output lora --data photos
"""


def add_parser(subparsers: Subparsers, **options: Any) -> argparse.ArgumentParser:
    summary = "make a plain PEFT adapter of a fine-tuned checkpoint"
    parser = subparsers.add_parser("extract", help=summary, description=summary, epilog=EPILOG, **options)
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a fine-tuned checkpoint: a folder, or a repo id (org/name@revision)"
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--rank", type=int, default=16, metavar="N", help="rank of the adapter (default: %(default)s)")
    size.add_argument(
        "--energy",
        type=float,
        metavar="F",
        help="in place of --rank: the share of the squared change to keep",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="new folder for the adapter")
    parser.add_argument("--data", metavar="PATH", help="labelled images, in class folders, to compare accuracies on")
    add_json_argument(parser, "rank, energy and accuracies")
    add_base_model_argument(parser)
    add_device_argument(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    from ..pool.extraction import extract

    check_json(args, "energy")
    found = extract(
        args.checkpoint,
        args.output,
        args.rank,
        energy=args.energy,
        base_model=args.base_model,
        base_revision=args.base_revision,
        data=args.data,
        device=checked_device(args.device),
    )
    told = (
        f"{found.folder}: rank {found.rank} holds {100 * found.energy:.1f}% of the squared change of the layers; "
        f"{100 * found.left_out:.1f}% of the whole change is in norms, biases and embeddings, which no LoRA holds"
    )
    if found.accuracy is not None:
        told += f"\naccuracy: {found.accuracy[0]:.2f}% of the checkpoint, {found.accuracy[1]:.2f}% of the adapter"
    result(args, {**dataclasses.asdict(found), "folder": str(found.folder)}, told)
    hint(f"lora-recycle inspect {shlex.quote(args.output)}")
