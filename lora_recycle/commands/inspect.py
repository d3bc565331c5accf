"""`lora-recycle inspect`: what adapters, pools and surrogate data are, read without a model."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

from .common import hint, sources, table


EPILOG = """\
examples:
  lora-recycle inspect demo                                the shipped pool
  lora-recycle inspect pool/cats someone/vit-lora-birds    a folder and a repo of the Hub
  lora-recycle inspect surrogate                           surrogate data that invert made
  lora-recycle inspect pool --json | jq '.[].sha256'
"""

ADAPTER_HEADER = ("name", "base", "type", "rank", "targets", "classes", "labels", "transformers", "size", "commit")
SHARD_HEADER = ("adapter", "images", "accuracy", "confidence")


def add_parser(subparsers, **options) -> argparse.ArgumentParser:
    summary = "describe adapters, folders of adapters, or surrogate data"
    parser = subparsers.add_parser("inspect", help=summary, description=summary, epilog=EPILOG, **options)
    parser.add_argument(
        "what", nargs="+", metavar="ADAPTER_OR_FOLDER", help="adapter, folder of adapters, repo id or surrogate folder"
    )
    parser.add_argument("--json", action="store_true", help="print everything that is known as JSON")
    return parser


def run(args: argparse.Namespace) -> None:
    from ..hub.adapters import find_adapters, pull_adapter
    from ..surrogate import MANIFEST, SurrogateDataset

    infos, surrogates = [], []
    for source in sources(args.what):
        if (Path(source) / MANIFEST).is_file():
            surrogates.append(SurrogateDataset.from_pretrained(source))
            continue
        found = find_adapters(source) if Path(source).is_dir() else [source]
        infos += [pull_adapter(path) for path in found]
    if args.json:
        everything = [{"kind": "adapter", **info.to_dict()} for info in infos]
        everything += [{"kind": "surrogate", "path": str(s.folder), **s.manifest} for s in surrogates]
        print(json.dumps(everything, indent=1, default=str))
    else:
        parts = [table(ADAPTER_HEADER, map(_adapter_row, infos))] if infos else []
        parts += [_surrogate_text(surrogate) for surrogate in surrogates]
        print("\n\n".join(parts))
    names = " ".join(shlex.quote(name) for name in args.what)
    hint(
        "lora-recycle distill POOL --surrogate " + names
        if surrogates
        else f"lora-recycle invert {names} --output surrogate"
    )


def _adapter_row(info) -> tuple:
    return (
        info.name,
        info.base_model,
        info.peft_type + ("+DoRA" if info.config.get("use_dora") else ""),
        info.rank,
        ",".join(info.targets),
        info.num_classes,
        _first(info.labels),
        info.generation,
        _size(info.size_bytes),
        info.revision[:12] if info.revision else None,
    )


def _first(labels: tuple[str, ...] | None, shown: int = 3, width: int = 20) -> str | None:
    if labels is None:
        return None
    names = [label if len(label) <= width else label[: width - 1] + "…" for label in labels[:shown]]
    return ", ".join(names) + (", …" if len(labels) > shown else "")


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


def _surrogate_text(surrogate) -> str:
    shards = surrogate.manifest["shards"]
    rows = [(s["adapter"]["name"], s["num_images"], s["accuracy"], s["confidence"]) for s in shards]
    base = surrogate.manifest.get("backbone", {}).get("name", "an unknown base")
    title = f"{surrogate.folder}: {len(surrogate)} images of {surrogate.num_shards} adapters of {base}"
    return f"{title}\n{table(SHARD_HEADER, rows)}"
