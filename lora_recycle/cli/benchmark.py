"""`lora-recycle benchmark`: methods x data sets x shots on the same episodes, from a recipe."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..runtime.terminal import counted, utf8
from .common import (
    Subparsers,
    add_device_argument,
    add_features_argument,
    add_json_argument,
    check_json,
    checked_device,
    note,
    result,
    table,
    terminal_width,
)


if TYPE_CHECKING:
    from ..evaluation.cells import Cell
    from ..evaluation.recipe import BenchmarkRecipe


EPILOG = """\
examples:
  lora-recycle benchmark examples/studies/benchmark-recipes/mixed.yaml --data-root DATA --output docs/benchmarks
  lora-recycle benchmark recipe.yaml --episodes 100 --tuning-episodes 5        a quick run
  lora-recycle benchmark recipe.yaml --part 0 2                                one of two shells that share the work

Writes results.json, results.md and index.html into the output folder, and a file for each finished cell (method, data
set, shots) into the work folder, from which the same command resumes. docs/benchmarks.md lists the keys of a recipe.
"""


def add_parser(subparsers: Subparsers, **options: Any) -> argparse.ArgumentParser:
    summary = "compare the methods of a recipe on the same episodes"
    parser = subparsers.add_parser("benchmark", help=summary, description=summary, epilog=EPILOG, **options)
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file of data sets, pools and methods")
    parser.add_argument("--data-root", metavar="DIR", help="folder in which data sets are looked for first")
    parser.add_argument(
        "--output", default="runs/benchmark", metavar="DIR", help="folder for the tables (default: %(default)s)"
    )
    parser.add_argument(
        "--work", metavar="DIR", help="folder of finished cells (default: cells/ in the output folder)"
    )
    parser.add_argument("--episodes", type=int, metavar="N", help="override the recipe's episodes")
    parser.add_argument("--tuning-episodes", type=int, metavar="N", help="override the recipe's tuning_episodes")
    parser.add_argument(
        "--part",
        nargs=2,
        type=int,
        default=(0, 1),
        metavar=("I", "N"),
        help="compute only every N-th cell, starting at I (0 to N - 1)",
    )
    add_json_argument(parser, "what results.json holds")
    add_features_argument(parser)
    add_device_argument(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    check_json(args, "rows", "details", "recipe")
    part, total = args.part
    if not 0 <= part < total:
        raise ConfigError(f"--part {part} {total}: I must be between 0 and {total - 1}.")
    if args.data_root is not None and not Path(args.data_root).is_dir():
        raise ConfigError(f"--data-root {args.data_root}: no such folder.")
    from ..evaluation.benchmark import Benchmark
    from ..evaluation.recipe import BenchmarkRecipe
    from ..evaluation.stored_features import OUTPUT
    from ..runtime.config import read_yaml
    from ..runtime.outputs import OutputKind, claim_output

    given = {"episodes": args.episodes, "tuning_episodes": args.tuning_episodes}
    values = {**read_yaml(args.recipe), **{key: value for key, value in given.items() if value is not None}}
    recipe, output = BenchmarkRecipe.from_dict(values, args.recipe), Path(args.output)
    work = Path(args.work) if args.work else output / "cells"
    claim_output(output, OutputKind("results of a benchmark", _has_results))
    claim_output(work, OutputKind("cells of a benchmark", _has_cells))
    if args.features:
        claim_output(args.features, OUTPUT)
    benchmark = Benchmark(recipe, work, args.data_root, checked_device(args.device), args.features)
    cells = benchmark.run((part, total), progress=not args.quiet)
    for remark in benchmark.notes:
        note(remark)
    missing = sum(cell.result is None for cell in cells)
    if missing:
        every = counted(len(cells), "cell")
        note(f"{missing} of {every} left to the other parts; the last to finish writes the tables.")
        return
    _write(args, recipe, cells, benchmark.notes, output)


def _has_results(folder: Path) -> bool:
    from ..runtime.outputs import holds_json

    return holds_json(folder / "results.json", "rows", "details", "recipe")


def _has_cells(folder: Path) -> bool:
    from ..runtime.outputs import holds_json

    cells = list(folder.glob("*.json"))
    return bool(cells) and holds_json(cells[0], "identity", "accuracies")


def _write(
    args: argparse.Namespace, recipe: BenchmarkRecipe, cells: list[Cell], notes: list[str], output: Path
) -> None:
    from ..evaluation.summary import markdown, rows_and_details
    from ..reports.benchmark_page import benchmark_page
    from ..runtime.files import atomic_write
    from ..runtime.provenance import versions

    rows, details = rows_and_details(cells)
    about = {"recipe": recipe.to_dict(), "notes": notes, "versions": versions()}
    values = {"rows": rows, "details": details, **about}
    atomic_write(output / "results.json", (json.dumps(values, indent=1, allow_nan=False) + "\n").encode())
    atomic_write(output / "results.md", utf8(markdown(rows, details)))
    atomic_write(
        output / "index.html", utf8(benchmark_page(f"Benchmark: {Path(args.recipe).stem}", rows, details, about))
    )
    header = ("method", "data", "shots", "accuracy", "vs frozen", "vs average")
    shown = [
        (
            row["method"],
            row["data"],
            row["shots"],
            f"{row['accuracy']:.2f} ± {row['ci95']:.2f}",
            f"{row['delta_vs_frozen']:+.2f} ± {row['delta_ci95']:.2f}",
            f"{detail['delta_vs_average']:+.2f} ± {detail['delta_vs_average_ci95']:.2f}",
        )
        for row, detail in zip(rows, details, strict=True)
    ]
    result(args, values, table(header, shown, terminal_width(sys.stdout)))
    note(f"Wrote {', '.join(str(output / file) for file in ('results.json', 'results.md', 'index.html'))}.")
