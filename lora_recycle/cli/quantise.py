"""`lora-recycle quantise`: an adapter with its weights in fewer bits, or as a plain PEFT adapter again."""

from __future__ import annotations

import argparse
import shlex
from typing import Any

from .common import BITS_HELP, Subparsers, hint


EPILOG = """\
examples:
  lora-recycle quantise meta_lora --bits 4 --output small
  lora-recycle quantise someone/small-meta-lora --bits 32 --output plain      for PeftModel.from_pretrained

Everything here reads all of them: predict, evaluate, pools of adapters. Other PEFT users need 32 or 16 bits. Going
back to 32 bits makes the file plain; what the codes lost stays lost. docs/more.md has size against accuracy.
"""


def add_parser(subparsers: Subparsers, **options: Any) -> argparse.ArgumentParser:
    summary = "write an adapter with its weights in fewer bits, or as a plain PEFT adapter again"
    parser = subparsers.add_parser("quantise", help=summary, description=summary, epilog=EPILOG, **options)
    parser.add_argument(
        "adapter", metavar="ADAPTER", help="an adapter or meta-LoRA: folder, repo id (org/name@revision), or demo"
    )
    parser.add_argument("--bits", type=int, required=True, metavar="N", help=f"for each weight: {BITS_HELP}")
    parser.add_argument("--output", required=True, metavar="DIR", help="new folder that it goes to")
    return parser


def run(args: argparse.Namespace) -> None:
    from ..adapters.pull import pull_adapter
    from ..adapters.sources import one_id
    from ..hub.embedded import resolve_meta_lora
    from ..modeling.publishing import write_adapter

    name, revision = one_id(args.adapter)
    before = pull_adapter(resolve_meta_lora(name), revision=revision)
    write_adapter(before, args.output, args.bits)
    after = pull_adapter(args.output)
    print(f"{args.output}: {after.size_bytes} bytes in {after.file}, before {before.size_bytes}")
    hint(f"lora-recycle push {shlex.quote(args.output)} OWNER/NAME")
