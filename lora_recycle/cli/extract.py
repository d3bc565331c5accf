"""`lora-recycle extract`: what was tuned in a whole checkpoint, as a plain PEFT adapter."""

from __future__ import annotations

import argparse
import shlex
from typing import Any

from .common import Subparsers, add_base_model_argument, add_device_argument, echo, hint


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
    add_base_model_argument(parser)
    add_device_argument(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    from ..pool.extraction import extract
    from .common import checked_device

    result = extract(
        args.checkpoint,
        args.output,
        args.rank,
        energy=args.energy,
        base_model=args.base_model,
        base_revision=args.base_revision,
        data=args.data,
        device=checked_device(args.device),
    )
    echo(
        f"{result.folder}: rank {result.rank} holds {100 * result.energy:.1f}% of the squared change of the layers; "
        f"{100 * result.left_out:.1f}% of the whole change is in norms, biases and embeddings, which no LoRA holds"
    )
    if result.accuracy is not None:
        echo(f"accuracy: {result.accuracy[0]:.2f}% of the checkpoint, {result.accuracy[1]:.2f}% of the adapter")
    hint(f"lora-recycle inspect {shlex.quote(args.output)}")
