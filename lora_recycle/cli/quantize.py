"""`lora-recycle quantize`: an adapter with its weights in fewer bits, or as a plain PEFT adapter again."""

from __future__ import annotations

import argparse
import shlex
from typing import Any

from .common import BITS_HELP, Subparsers, add_json_argument, check_json, hint, result


EPILOG = """\
examples:
  lora-recycle quantize meta_lora --bits 4 --output small
  lora-recycle quantize someone/small-meta-lora --bits 32 --output plain      for PeftModel.from_pretrained

lora_recycle reads all of them; PEFT needs 32 or 16 bits. Converting back to 32 bits makes the file plain PEFT, but
does not restore what the codes lost. docs/more.md compares size and accuracy.
"""


def add_parser(subparsers: Subparsers, **options: Any) -> argparse.ArgumentParser:
    summary = "store an adapter in fewer bits per weight, or convert it back to plain PEFT"
    parser = subparsers.add_parser("quantize", help=summary, description=summary, epilog=EPILOG, **options)
    parser.add_argument(
        "adapter", metavar="ADAPTER", help="adapter or meta-LoRA: a folder, a repo id (org/name@revision), or demo"
    )
    parser.add_argument("--bits", type=int, required=True, metavar="N", help=f"bits per weight: {BITS_HELP}")
    parser.add_argument("--output", required=True, metavar="DIR", help="new folder for the result")
    add_json_argument(parser, "the sizes")
    return parser


def run(args: argparse.Namespace) -> None:
    from ..adapters.pull import pull_adapter
    from ..adapters.sources import one_id
    from ..hub.embedded import resolve_meta_lora
    from ..modeling.publishing import write_adapter
    from ..runtime.outputs import check_output

    check_json(args, "folder", "bytes_before")
    check_output(args.output)
    name, revision = one_id(args.adapter)
    before = pull_adapter(resolve_meta_lora(name), revision=revision)
    write_adapter(before, args.output, args.bits)
    after = pull_adapter(args.output)
    values = {"folder": args.output, "file": after.file, "bytes": after.size_bytes, "bytes_before": before.size_bytes}
    result(args, values, f"{args.output}: {after.size_bytes} bytes in {after.file}, {before.size_bytes} before")
    hint(f"lora-recycle push {shlex.quote(args.output)} OWNER/NAME")
