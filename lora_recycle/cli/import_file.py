"""`lora-recycle import`: an adapter saved by the paper's own code, as a PEFT folder."""

from __future__ import annotations

import argparse
import shlex
from typing import Any

from .common import Subparsers, add_json_argument, check_json, hint, result


EPILOG = """\
examples:
  lora-recycle import lora_0.safetensors --base-model openai/clip-vit-base-patch16 --output adapters/lora_0

The file holds w_a_000, w_b_000, ... and fc_512in_5out, as the code of the paper LoRA Recycle saves them for CLIP.
"""


def add_parser(subparsers: Subparsers, **options: Any) -> argparse.ArgumentParser:
    summary = "convert an adapter saved by the paper's own code into a PEFT folder"
    parser = subparsers.add_parser("import", help=summary, description=summary, epilog=EPILOG, **options)
    parser.add_argument("file", metavar="FILE", help="safetensors file saved by the paper's code")
    parser.add_argument("--base-model", required=True, metavar="X", help="folder or repo id of the CLIP model")
    parser.add_argument("--base-revision", metavar="R", help="branch, tag or commit of the CLIP model")
    parser.add_argument("--output", required=True, metavar="DIR", help="new folder for the adapter")
    add_json_argument(parser, "the folder")
    return parser


def run(args: argparse.Namespace) -> None:
    from ..adapters.paper_format import import_paper_file

    check_json(args, "folder")
    folder = import_paper_file(args.file, args.base_model, args.output, base_revision=args.base_revision)
    result(args, {"folder": folder}, str(folder))
    hint(f"lora-recycle inspect {shlex.quote(args.output)}")
