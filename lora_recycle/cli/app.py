"""`lora-recycle app`: a page in the browser that classifies one's own images."""

from __future__ import annotations

import argparse
from typing import Any

from .common import META_LORA_HELP, Subparsers, add_device_argument, checked_device, echo, note


EPILOG = """\
examples:
  lora-recycle app                                  open the page with the shipped meta-LoRA
  lora-recycle app --model meta_lora --port 8000
  lora-recycle app --model someone/meta-lora@v1 --no-browser
  lora-recycle app --host 0.0.0.0 --allow-host vision.example.org      for others, behind a proxy of this name

The page is served to this machine only and sends nothing elsewhere. It needs Gradio: pip install 'lora-recycle[app]'
"""


def add_parser(subparsers: Subparsers, **options: Any) -> argparse.ArgumentParser:
    summary = "classify your own images in the browser"
    parser = subparsers.add_parser("app", help=summary, description=summary, epilog=EPILOG, **options)
    parser.add_argument("--model", default="demo", metavar="MODEL", help=f"{META_LORA_HELP} (default: %(default)s)")
    parser.add_argument("--port", type=int, metavar="N", help="port (default: the first free one from 7860)")
    parser.add_argument(
        "--host", default="127.0.0.1", metavar="H", help="address to listen on (default: %(default)s, this machine)"
    )
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="another name under which browsers reach the page; names that are not given are refused (repeatable)",
    )
    parser.add_argument("--no-browser", action="store_true", help="do not open a browser")
    add_device_argument(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    from ..app.page import launch

    page = launch(
        args.model,
        host=args.host,
        port=args.port,
        browser=not args.no_browser,
        device=checked_device(args.device),
        hosts=args.allow_host,
    )
    echo(page.local_url)
    note("Press Ctrl-C to stop.")
    page.block_thread()
