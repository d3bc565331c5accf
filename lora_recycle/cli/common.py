"""What several verbs share: tables and hints, the pool's arguments, the device."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeAlias

from ..errors import AdapterError
from ..hub.embedded import pool_path
from ..runtime.terminal import counted, fit_widths, printable, shorten, single_line


if TYPE_CHECKING:
    import torch

    from ..images.tables import Columns
    from ..modeling.meta_lora import MetaLoRAForFewShotClassification
    from ..pool.pool import AdapterPool
    from ..runtime.plans import Plan

#: What `add_subparsers` returns, for which argparse has no public name.
Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def terminal_width(stream: TextIO) -> int | None:
    """Characters in a line of the terminal that a stream leads to; None where it leads to a file or a program."""
    return shutil.get_terminal_size().columns if stream.isatty() else None


def table(header: Sequence[str], rows: Iterable[Sequence[Any]], room: int | None = None) -> str:
    """Rows in aligned columns under a header, numbers to the right, each row on one line.

    Args:
        room: characters in a line. Long cells are shortened to fit; where that is not enough, each row becomes lines
            of `column: cell`.
    """
    rows = [list(row) for row in rows]
    lines = [list(header)] + [["-" if cell is None else single_line(str(cell)) for cell in row] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    numeric = [
        bool(rows) and all(isinstance(row[i], (int, float, type(None))) for row in rows) for i in range(len(widths))
    ]
    fitted = fit_widths(widths, [not right for right in numeric], room)
    if fitted is None:
        rows_of_lines = [[f"{name}: {cell}" for name, cell in zip(header, line, strict=True)] for line in lines[1:]]
        return "\n\n".join("\n".join(named) for named in rows_of_lines)
    widths = fitted
    return "\n".join(
        "  ".join(
            shorten(cell, width).rjust(width) if right else shorten(cell, width).ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in lines
    )


def echo(text: object) -> None:
    """A result on stdout. With `note` the only way to the terminal: names in it come from anyone."""
    print(printable(str(text)), flush=True)


def note(text: str) -> None:
    """A remark on stderr: what the user should know but no program should parse."""
    print(printable(text), file=sys.stderr, flush=True)


def add_json_argument(parser: argparse._ActionsContainer, what: str) -> None:
    """`--json`, the same for every verb. `main` sees to it that only a name in `.json` is taken for its FILE."""
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE.json",
        help=f"print {what} as JSON instead of text, or write it to this file beside the text",
    )


def check_json(args: argparse.Namespace, *keys: str) -> None:
    """Make sure, before the work, that the file of `--json` can be written.

    Args:
        keys: what the JSON of this verb, or each item of its list, holds: a file without them is not replaced.
    """
    if args.json in (None, "-"):
        return
    from ..runtime.outputs import check_file, holds_json

    check_file(args.json, lambda path: holds_json(path, *keys), f"what lora-recycle {args.verb} wrote")


def result(args: argparse.Namespace, values: Any, text: str) -> None:
    """The result of a verb on stdout, as text or as JSON, and the JSON in a file where one was named."""
    content = None if args.json is None else json.dumps(values, indent=1, default=str, allow_nan=False)
    echo(content if args.json == "-" else text)
    if content is not None and args.json != "-":
        from ..runtime.files import atomic_write

        atomic_write(Path(args.json), f"{content}\n".encode())


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """What verbs that read images of a user's own have: the columns of a table, and what to do with broken ones."""
    parser.add_argument("--image-column", metavar="NAME", help="column of the images in a table (default: found)")
    parser.add_argument("--label-column", metavar="NAME", help="column of their labels (default: found)")
    parser.add_argument(
        "--skip-errors", action="store_true", help="skip images that cannot be read, and list them on stderr"
    )


def columns(args: argparse.Namespace) -> Columns:
    from ..images.tables import Columns

    return Columns(args.image_column, args.label_column)


def notify_failures(failures: Mapping[int, str] | None) -> None:
    """The images that were left out, and why, on stderr."""
    if failures:
        note("\n".join([f"{counted(len(failures), 'image')} skipped:", *map(single_line, failures.values())]))


_quiet = False  # of the command that runs in this process; `main` sets it


def quieten(quiet: bool) -> None:
    """Whether hints are left out, as `--quiet` asks for."""
    global _quiet
    _quiet = quiet


def hint(command: str) -> None:
    """The command that usually comes next, on stderr, unless `--quiet` was given."""
    if not _quiet:
        note(f"Next: {command}")


def add_base_model_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base-model",
        metavar="X",
        help="folder or repo id of the base model (default: the one that the adapters name)",
    )
    parser.add_argument("--base-revision", metavar="R", help="branch, tag or commit of the base model")


def add_on_error_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--on-error",
        choices=("raise", "skip"),
        default="raise",
        help="stop at an adapter that cannot be used, or skip it and list it (default: %(default)s)",
    )


def add_resume_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="continue an interrupted run with the same settings in the output folder; --no-resume deletes what is "
        "there and starts over (default: resume)",
    )


def add_features_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--features",
        metavar="DIR",
        help="keep the images' features by each network in this folder, and take from it what is there: another table "
        "of the same images then costs no forward. Delete the folder to free its space (default: keep none)",
    )


def add_dry_run_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="write nothing: print what would be done, GFLOPs, memory, disk, and the time of each stage from three "
        "steps that are measured now",
    )


def echo_plan(plan: Plan) -> None:
    """The stages of a plan as a table on stdout, its notes on stderr."""
    if is_main_process():
        echo(table(("stage", "work", "GFLOPs", "time"), plan.rows()))
        echo(plan.summary())
        for text in plan.notes:
            note(f"{text[0].upper()}{text[1:]}.")


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        metavar="D",
        help="device, as torch names it: cpu, cuda, cuda:1, mps (default: a GPU if there is one)",
    )


def add_class_names_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--class-names",
        metavar="NAMES",
        help="class names for adapters without a head: cat,dog for all of them, a .txt file with one per line, or a "
        ".yaml or .json file with one list, or with a list for each adapter",
    )


#: What names a meta-LoRA, for the help.
META_LORA_HELP = "meta-LoRA: a folder, a repo id (org/name@revision), or demo for the shipped one"
#: In how many bits weights can be stored, for the help.
BITS_HELP = "32 or 16 (bfloat16) for plain PEFT; 8, 4, 2 or 1 for codes that only lora_recycle reads"
#: The strings that name adapters, for the help.
POOL_HELP = (
    "adapters: folders, folders of adapters, repo ids (org/name@revision), .txt files with one of these per line, "
    "collection:org/slug, search:tag,tag, author:org, or demo for the shipped pool"
)


def add_pool_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pool", nargs="+", metavar="POOL", help=POOL_HELP)
    add_on_error_argument(parser)
    add_base_model_argument(parser)
    add_device_argument(parser)


def sources(names: Sequence[str]) -> list[str | Path]:
    """The names as the user gave them, with `demo` for the embedded pool."""
    return [pool_path() if name == "demo" else name for name in names]


def load_pool(args: argparse.Namespace, **options: Any) -> AdapterPool:
    """The [`AdapterPool`] that the pool arguments describe. Skipped adapters are reported on stderr."""
    from ..pool.pool import AdapterPool

    device = checked_device(args.device)  # first: a launch that went wrong is to be refused before anything is read
    pool = AdapterPool.from_pretrained(
        sources(args.pool),
        args.base_model,
        base_revision=args.base_revision,
        on_error=args.on_error,
        device=device,
        progress=not args.quiet,
        **options,
    )
    if is_main_process():
        notify_skipped(pool.skipped, len(pool))
    return pool


def load_model(args: argparse.Namespace, named: str, head: str | None = None) -> MetaLoRAForFewShotClassification:
    """The model that MODEL names: a meta-LoRA, or a base model alone, which is then used as it is, with a note."""
    from ..adapters.sources import one_id
    from ..modeling.meta_lora import MetaLoRAForFewShotClassification

    device = checked_device(args.device)
    name, revision = one_id(named)
    try:
        return MetaLoRAForFewShotClassification.from_pretrained(
            name,
            revision=revision,
            head=head,
            base_model=args.base_model,
            base_revision=args.base_revision,
            device=device,
        )
    except AdapterError:
        if args.base_model is not None or not _is_base_model(name, revision):
            raise
    note(f"{named}: a base model without a meta-LoRA, used frozen.")
    return MetaLoRAForFewShotClassification.from_backbone(
        name, head=head or "prototypes", revision=revision, device=device
    )


def _is_base_model(name: str, revision: str | None) -> bool:
    """Whether a folder or repo holds a base model and no adapter."""
    from ..backbones.base_models import CONFIG_FILES, BaseModel

    try:
        BaseModel.pull(name, revision, CONFIG_FILES)
    except AdapterError:
        return False
    return name != "demo"


def notify_skipped(skipped: Sequence[tuple[str, str]], used: int) -> None:
    """A table of the adapters that were left out, and why, on stderr."""
    if skipped:
        every = counted(used + len(skipped), "adapter")
        note(f"{len(skipped)} of {every} skipped:\n{table(('skipped', 'reason'), skipped)}")


def checked_device(name: str | None) -> torch.device:
    """Where to compute. Raises `ConfigError` where this machine has no device of this name."""
    from ..runtime.launch import choose_device

    return choose_device(name)


def is_main_process() -> bool:
    """False on all but one of the processes that `accelerate launch` started."""
    from ..runtime.launch import process_state

    return process_state().is_main_process
