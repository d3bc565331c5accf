"""`lora-recycle inspect`: what adapters, pools and surrogate data are, read without the weights of a model."""

from __future__ import annotations

import argparse
import dataclasses
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, DataError
from ..runtime.terminal import counted, single_line
from .common import (
    META_LORA_HELP,
    POOL_HELP,
    Subparsers,
    add_base_model_argument,
    add_class_names_argument,
    add_json_argument,
    add_on_error_argument,
    check_json,
    echo,
    hint,
    note,
    notify_skipped,
    result,
    sources,
    table,
    terminal_width,
)


if TYPE_CHECKING:
    from ..adapters.pull import AdapterInfo
    from ..adapters.usability import Usability
    from ..backbones.backbone import Backbone
    from ..surrogate.dataset import SurrogateDataset


EPILOG = """\
examples:
  lora-recycle inspect demo                                the shipped pool
  lora-recycle inspect pool/cats someone/vit-lora-birds@v1 a folder and a repo on the Hub
  lora-recycle inspect search:base_model:adapter:google/vit-base-patch16-224,peft --on-error skip
  lora-recycle inspect surrogate                           surrogate data made by invert
  lora-recycle inspect surrogate --images                  a page of its images, masks and confidences
  lora-recycle inspect surrogate --images --meta-lora meta_lora --data photos    with maps before and after
  lora-recycle inspect pool --json | jq '.[].sha256'
  lora-recycle inspect search:peft,birds --on-error skip --short > ids.txt      pinned: id@commit
"""

ADAPTER_HEADER = (
    *("name", "base", "revision", "type", "rank", "targets", "classes", "labels"),
    *("transformers", "converted", "size", "usable", "commit"),
)
EXPERT_HEADER = ("domain", "adapters", "chosen", "folder", "names")
#: The page of `--images`.
PAGE = "images.html"
SHARD_HEADER = ("adapter", "images", "accuracy", "confidence")


def add_parser(subparsers: Subparsers, **options: Any) -> argparse.ArgumentParser:
    summary = "describe adapters, folders of adapters, or surrogate data"
    parser = subparsers.add_parser("inspect", help=summary, description=summary, epilog=EPILOG, **options)
    parser.add_argument("what", nargs="+", metavar="WHAT", help=f"surrogate folders, and {POOL_HELP}")
    add_on_error_argument(parser)
    add_class_names_argument(parser)
    add_base_model_argument(parser)
    output = parser.add_mutually_exclusive_group()
    add_json_argument(output, "all details")
    output.add_argument("--short", action="store_true", help="print only names, pinned to commits, for ids.txt")
    output.add_argument("--images", action="store_true", help="write images.html into each surrogate folder")
    parser.add_argument(
        "--meta-lora",
        metavar="X",
        help=f"with --images: also map the embeddings without and with this {META_LORA_HELP}",
    )
    parser.add_argument("--data", metavar="PATH", help="with --images: real images for the map, in class folders")
    return parser


def run(args: argparse.Namespace) -> None:
    from ..adapters.class_names import name_classes
    from ..adapters.sources import BadAdapters, pull_adapters
    from ..adapters.usability import check_usable
    from ..surrogate.dataset import MANIFEST, SurrogateDataset

    if (args.meta_lora or args.data) and not args.images:
        raise ConfigError("--meta-lora and --data need --images.")
    check_json(args, "kind")
    named = sources(args.what)
    folders = [name for name in named if (Path(name) / MANIFEST).is_file()]
    surrogates = [SurrogateDataset.from_pretrained(folder) for folder in folders]
    if args.images:
        _write_pages(args, surrogates, [name for name in named if name not in folders])
        return
    bad = BadAdapters(args.on_error)
    infos = pull_adapters([name for name in named if name not in folders], bad, progress=not args.quiet)
    infos = name_classes(infos, args.class_names, [name for name, _ in bad.skipped])
    checked = [] if args.short else check_usable(infos, args.base_model, args.base_revision)
    if args.short:
        for info in infos:
            echo(single_line(info.where if info.revision else str(info.path)))
        for surrogate in surrogates:
            echo(surrogate.folder)
    else:
        everything: list[dict[str, Any]] = [
            {"kind": "adapter", **info.to_dict(), **_domains(info), **dataclasses.asdict(found)}
            for info, found in zip(infos, checked, strict=True)
        ]
        everything += [{"kind": "skipped", "name": name, "reason": reason} for name, reason in bad.skipped]
        everything += [{"kind": "surrogate", "path": str(s.folder), **s.manifest} for s in surrogates]
        room = terminal_width(sys.stdout)
        parts = [table(ADAPTER_HEADER, map(_adapter_row, infos, checked), room)] if infos else []
        reasons = [single_line(f"usable: {found}") for found in checked if found.reason]
        parts += ["\n".join(reasons)] if reasons else []
        parts += [text for info in infos if (text := _domains_text(info))]
        parts += [_surrogate_text(surrogate) for surrogate in surrogates]
        if parts or args.json:
            result(args, everything, "\n\n".join(parts))
    notify_skipped(bad.skipped, len(infos))
    if not infos or args.short or any(found.usable is not False for found in checked):
        hint(_next(args, infos, bool(surrogates)))


def _next(args: argparse.Namespace, infos: list[AdapterInfo], surrogate: bool) -> str:
    """What these are for: surrogate data to distil, a meta-LoRA, which has no head to invert, to predict with."""
    from ..hub.repo_files import SIDECAR_FILE

    if surrogate:
        return f"lora-recycle distill POOL --surrogate {shlex.join(args.what)} --output meta_lora"
    if len(infos) == 1 and (infos[0].path / SIDECAR_FILE).is_file():
        return f"lora-recycle predict {shlex.join(args.what)} --support EXAMPLES PHOTOS"
    return f"lora-recycle invert {shlex.join(args.what)} --output surrogate"


def _write_pages(args: argparse.Namespace, surrogates: list, others: list) -> None:
    """A page in each surrogate folder; its path goes to stdout."""
    if others or not surrogates:
        raise DataError(f"{(others or args.what)[0]}: has no surrogate data, which --images needs.")
    from ..images.labelled import load_labelled_images
    from ..reports.html_page import is_page
    from ..reports.surrogate_page import map_images, read_patch_size, write_surrogate_page
    from ..runtime.outputs import check_file

    for surrogate in surrogates:
        check_file(surrogate.folder / PAGE, is_page, "a page of lora-recycle")
    for surrogate in surrogates:
        views = _views(args, surrogate) if args.meta_lora or args.data else []
        images = None
        if views:
            backbone = views[0][1]
            size = (backbone.image_size, int(backbone.processor.resample))
            images = map_images(surrogate, load_labelled_images(args.data, *size) if args.data else None)
        patch_size = views[0][1].patch_size if views else read_patch_size(surrogate)
        if patch_size is None:
            note(f"{surrogate.folder}: the patch size of its backbone is not available, so masks are not shown.")
        path = surrogate.folder / PAGE
        echo(write_surrogate_page(path, surrogate, patch_size=patch_size, images=images, views=views))
    hint(f"lora-recycle distill POOL --surrogate {shlex.join(args.what)} --output meta_lora")


def _views(args: argparse.Namespace, surrogate: SurrogateDataset) -> list[tuple[str, Backbone]]:
    """The frozen backbone and, where one is named, the meta-LoRA on it."""
    from ..adapters.sources import one_id
    from ..backbones.backbone import Backbone
    from ..modeling.meta_lora import MetaLoRAForFewShotClassification

    views, base = [], surrogate.manifest.get("backbone", {})
    if args.meta_lora:
        name, revision = one_id(args.meta_lora)
        adapted = MetaLoRAForFewShotClassification.from_pretrained(name, revision=revision).backbone
        views, base = [("With the meta-LoRA", adapted)], {"name": adapted.name, "revision": adapted.revision}
    if not base.get("name"):
        raise DataError(f"{surrogate.folder}: its manifest names no backbone. Pass one with --meta-lora.")
    return [("Frozen backbone", Backbone.from_pretrained(base["name"], revision=base.get("revision"))), *views]


def _adapter_row(info: AdapterInfo, found: Usability) -> tuple[Any, ...]:
    return (
        info.name,
        info.base_model,
        _short(info.base_revision),
        info.peft_type + ("+DoRA" if info.config.get("use_dora") else ""),
        info.rank,
        ",".join(info.targets),
        info.num_classes,
        _first(info.labels),
        info.generation,
        None if info.converted is None else "yes" if info.converted else "no",
        _size(info.size_bytes),
        {True: "yes", False: "no", None: "?"}[found.usable],
        _short(info.revision),
    )


def _short(revision: str | None) -> str | None:
    """A commit's first 12 digits; names of branches and tags as they are."""
    return revision[:12] if revision and re.fullmatch("[0-9a-f]{40}", revision) else revision


def _domains(info: AdapterInfo) -> dict[str, Any]:
    """The part `domains` of a meta-LoRA's sidecar."""
    from ..adapters.experts import read_domains
    from ..adapters.files import read_sidecar_json

    found = read_domains(read_sidecar_json(info.path, info.where), info.where)
    return {} if found is None else {"domains": found.to_dict()}


def _domains_text(info: AdapterInfo) -> str:
    """The experts of a meta-LoRA as a table; empty where it has none."""
    from ..hub.repo_files import expert_folder

    experts = _domains(info).get("domains", {}).get("experts", [])
    rows = [
        (
            expert["name"],
            len(expert["adapters"]),
            "compared with" if expert["role"] == "compared" else "yes",
            expert_folder(number),
            _first(tuple(adapter["name"] for adapter in expert["adapters"])),
        )
        for number, expert in enumerate(experts, 1)
    ]
    if not rows:
        return ""
    shown = table(EXPERT_HEADER, rows, terminal_width(sys.stdout))
    return f"{single_line(info.name)}: {counted(len(rows), 'expert')}\n{shown}"


def _first(labels: tuple[str, ...] | None, shown: int = 3, width: int = 20) -> str | None:
    if labels is None:
        return None
    names = [label if len(label) <= width else label[: width - 1] + "…" for label in labels[:shown]]
    return ", ".join(names) + (", …" if len(labels) > shown else "")


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


def _surrogate_text(surrogate: SurrogateDataset) -> str:
    shards = surrogate.manifest["shards"]
    rows = [(s["adapter"]["name"], s["num_images"], s["accuracy"], s["confidence"]) for s in shards]
    base = surrogate.manifest.get("backbone", {}).get("name", "an unknown base")
    count = f"{counted(len(surrogate), 'image')} of {counted(surrogate.num_shards, 'adapter')}"
    title = single_line(f"{surrogate.folder}: {count} of {base}")
    return f"{title}\n{table(SHARD_HEADER, rows, terminal_width(sys.stdout))}"
