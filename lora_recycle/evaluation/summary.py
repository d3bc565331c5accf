"""Cells of a benchmark to rows, differences and Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..hub.markdown import text
from .cells import Cell
from .results import confidence, summarise


def by_task(cells: Sequence[Cell]) -> dict[tuple[str, int, int], list[Cell]]:
    """Finished cells by (data, ways, shots), in their order. Raises `DataError` where one has no result."""
    found: dict[tuple[str, int, int], list[Cell]] = {}
    for cell in cells:
        cell.finished()
        found.setdefault((cell.data, cell.ways, cell.shots), []).append(cell)
    return found


def rows_and_details(cells: Sequence[Cell]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows as [`summarise`] makes them with `tuning_free`, and for each the further differences and costs.

    All differences are paired over the episodes of the method itself, which for tuning methods are the first of the
    others'. The best baseline of a pool on a task is the method without tuning that has the highest mean there,
    meta-LoRAs and transductive heads left out: being the best of many on these very episodes favours it.
    """
    rows, details = [], []
    for group in by_task(cells).values():
        frozen = next(cell for cell in group if cell.kind == "frozen").finished().accuracies
        for cell in group:
            values, count = cell.finished().accuracies, len(cell.finished().accuracies)
            found = summarise({"frozen": frozen[:count], cell.label: values}, cell.data, cell.ways, cell.shots)[-1]
            rows.append({**found, "tuning_free": cell.tuning_free})
            detail = {key: found[key] for key in ("method", "data", "ways", "shots")}
            detail |= {"pool": cell.pool, "kind": cell.kind, "transductive": cell.transductive}
            baselines = {"average": _average(group, cell.pool), "best_rival": best_baseline(group, cell.pool)}
            for name, baseline in baselines.items():
                delta = confidence(values.double() - baseline.finished().accuracies[:count].double())
                detail[f"delta_vs_{name}"], detail[f"delta_vs_{name}_ci95"] = (round(x, 3) for x in delta)
            detail["best_rival"] = baselines["best_rival"].label
            detail["seconds_per_task"] = float(f"{cell.finished().seconds_per_task:.3g}")
            detail["peak_memory_mb"] = float(f"{cell.finished().peak_memory_mb:.3g}")
            details.append(detail)
    return rows, details


def best_baseline(group: Sequence[Cell], pool: str) -> Cell:
    """Of one task's cells: the best that needs no tuning, no recycling and no other queries, of `pool` or of none."""
    candidates = [
        cell
        for cell in group
        if cell.kind in ("frozen", "rival") and not cell.transductive and (cell.pool == pool or cell.kind == "frozen")
    ]
    return max(candidates, key=lambda cell: cell.finished().accuracies.mean().item())


def _average(group: Sequence[Cell], pool: str) -> Cell:
    return next(cell for cell in group if cell.method == "average" and cell.pool == pool)


def markdown(rows: Sequence[dict[str, Any]], details: Sequence[dict[str, Any]]) -> str:
    """An overview, a line for each method and a column for each task, then one table of differences for each task."""
    parts = [overview(rows, details)]
    for task in dict.fromkeys((row["data"], row["ways"], row["shots"]) for row in rows):
        parts.append(f"### {text(task[0])}, {task[1]}-way {task[2]}-shot\n\n" + task_table(rows, details, task))
    return "\n\n".join(parts) + "\n"


def overview(rows: Sequence[dict[str, Any]], details: Sequence[dict[str, Any]]) -> str:
    """Accuracies of all methods on all tasks."""
    tasks = list(dict.fromkeys((row["data"], row["shots"]) for row in rows))
    row_of = {(row["method"], row["data"], row["shots"]): row for row in rows}
    named = {detail["method"]: _escaped_name(detail) for detail in details}
    lines = ["| method | " + " | ".join(f"{text(data)} {shots}-shot" for data, shots in tasks) + " |"]
    lines.append("|---|" + "---|" * len(tasks))
    for method, name in named.items():
        cells = [row_of.get((method, *task)) for task in tasks]
        shown = [f"{cell['accuracy']:.1f} ± {cell['ci95']:.1f}" if cell else "" for cell in cells]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def task_table(rows: Sequence[dict[str, Any]], details: Sequence[dict[str, Any]], task: tuple[str, int, int]) -> str:
    """Accuracy, paired differences and costs of all methods on one (data, ways, shots)."""
    header = ("method", "episodes", "accuracy", "vs frozen", "vs average", "vs best baseline", "s/task", "MB")
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    baselines = []
    for row, detail in zip(rows, details, strict=True):
        if (row["data"], row["ways"], row["shots"]) != task:
            continue
        deltas = [(row["delta_vs_frozen"], row["delta_ci95"])]
        deltas += [(detail[f"delta_vs_{x}"], detail[f"delta_vs_{x}_ci95"]) for x in ("average", "best_rival")]
        cells = [_escaped_name(detail), str(row["episodes"]), f"{row['accuracy']:.2f} ± {row['ci95']:.2f}"]
        cells += [f"{mean:+.2f} ± {half:.2f}" for mean, half in deltas]
        cells += [f"{detail['seconds_per_task']:g}", f"{detail['peak_memory_mb']:g}"]
        lines.append("| " + " | ".join(cells) + " |")
        baselines.append(f"{text(detail['best_rival'])} (pool {text(detail['pool'])})")
    return "\n".join(lines) + "\n\nBest baseline: " + ", ".join(dict.fromkeys(baselines)) + "."


def shown_name(detail: dict[str, Any]) -> str:
    """The method, with `*` where it tunes on each task and `†` where it sees the queries together."""
    return detail["method"] + _marks(detail)


def _escaped_name(detail: dict[str, Any]) -> str:
    """The same for Markdown."""
    return text(detail["method"]) + _marks(detail)


def _marks(detail: dict[str, Any]) -> str:
    return (" *" if detail["kind"] == "tuned" else "") + (" †" if detail["transductive"] else "")
