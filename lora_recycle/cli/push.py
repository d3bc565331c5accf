"""`lora-recycle push`: a meta-LoRA, surrogate data or an adapter to the Hub, in one commit."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import ConfigError, PushError
from .common import BITS_HELP, Subparsers, add_json_argument, check_json, hint, result


EPILOG = """\
examples:
  lora-recycle push meta_lora someone/meta-lora
  lora-recycle push surrogate someone/surrogate --private         a data set repo
  lora-recycle push meta_lora someone/small-meta-lora --bits 4    a seventh of the size, only lora_recycle reads it
  lora-recycle push pool/birds-000 someone/vit-lora-birds
  lora-recycle push meta_lora team/meta-lora --create-pr          a pull request, for others to merge

Log in with `hf auth login` or set HF_TOKEN. A failed push leaves nothing in the repo and can be repeated.
"""


def add_parser(subparsers: Subparsers, **options: Any) -> argparse.ArgumentParser:
    summary = "publish a meta-LoRA, surrogate data or an adapter on the Hub"
    parser = subparsers.add_parser("push", help=summary, description=summary, epilog=EPILOG, **options)
    parser.add_argument("folder", metavar="FOLDER", help="output of distill, invert or train-adapters")
    parser.add_argument("repo_id", metavar="REPO_ID", help="owner/name; created if missing")
    parser.add_argument("--private", action="store_true", default=None, help="create a new repo as private")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to push to; created from main if missing")
    parser.add_argument("--message", metavar="TEXT", help="commit message")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request")
    parser.add_argument("--bits", type=int, metavar="N", help=f"bits per weight: {BITS_HELP}")
    add_json_argument(parser, "the URL")
    return parser


def run(args: argparse.Namespace) -> None:
    check_json(args, "url")
    folder = Path(args.folder)
    options = {
        "private": args.private,
        "revision": args.revision,
        "commit_message": args.message,
        "create_pr": args.create_pr,
    }
    options |= {} if args.bits is None else {"bits": args.bits}
    if args.bits is not None and (folder / "manifest.json").is_file():
        raise ConfigError("--bits applies to adapters; surrogate data has no weights.")
    push = _surrogate if (folder / "manifest.json").is_file() else _adapter
    push(args, folder, options)


def _surrogate(args: argparse.Namespace, folder: Path, options: dict) -> None:
    from ..surrogate.dataset import SurrogateDataset

    url = SurrogateDataset.from_pretrained(folder).push_to_hub(args.repo_id, **options)
    result(args, {"url": url}, url)
    hint(f"lora-recycle distill POOL --surrogate {args.repo_id} --output meta_lora")


def _adapter(args: argparse.Namespace, folder: Path, options: dict) -> None:
    from ..hub.repo_files import CONFIG_FILE, SIDECAR_FILE
    from ..modeling.publishing import push_adapter_folder

    if not folder.exists():
        raise PushError(f"{folder}: no such folder.")
    if not (folder / CONFIG_FILE).is_file():
        raise PushError(
            f"{folder}: no meta-LoRA, surrogate data or adapter: it has neither {CONFIG_FILE} nor manifest.json. "
            "To push a pool, push the folder of each adapter."
        )
    url = push_adapter_folder(folder, args.repo_id, **options)
    result(args, {"url": url}, url)
    meta_lora, inspect = (folder / SIDECAR_FILE).is_file(), f"lora-recycle inspect {args.repo_id}"
    hint(f"lora-recycle predict {args.repo_id} --support EXAMPLES PHOTOS" if meta_lora else inspect)
