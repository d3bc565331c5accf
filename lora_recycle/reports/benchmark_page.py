"""A benchmark as one HTML file that needs no network: plots of paired differences, and the tables."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from ..evaluation.summary import shown_name
from .html_page import page, paragraph, preformatted, render, table


#: Beside the style of every page; the last column of the tables is text too.
_STYLE = """body { max-width: 76rem; } p { max-width: 50rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 1rem; }
figure { background: var(--panel); border: 1px solid var(--line); border-radius: 6px; padding: .6rem; }
figcaption { font-size: 1rem; font-weight: 600; }
.grid { stroke: var(--line); } .zero { stroke: var(--ink); stroke-dasharray: 4 3; }
.whisker { stroke: var(--ink); stroke-width: 1.5; }
.mark { stroke: var(--ink); fill: var(--page); } .mark.full { fill: var(--ink); }
th:last-child, td:last-child { text-align: left; }
"""

_KEY = (
    "Paired differences to prototypes on the frozen backbone, in points of accuracy; lines are 95% intervals. "
    "Filled square: meta-LoRA. Open circle: another method without tuning. Triangle: tunes on each task (*), on fewer "
    "episodes. Diamond: sees the queries of a task together (†)."
)
_LEFT, _RIGHT, _WIDTH, _LINE = 190, 470, 600, 22


def benchmark_page(
    title: str, rows: Sequence[dict[str, Any]], details: Sequence[dict[str, Any]], about: dict[str, Any]
) -> str:
    """The page.

    Args:
        rows, details: of [`summary.rows_and_details`].
        about: recipe, versions and notes, printed at the end.
    """
    tasks = list(dict.fromkeys((row["data"], row["ways"], row["shots"]) for row in rows))
    pairs = list(zip(rows, details, strict=True))
    groups = {t: [(r, d) for r, d in pairs if (r["data"], r["ways"], r["shots"]) == t] for t in tasks}
    plots = Markup("\n").join(_plot(task, group) for task, group in groups.items())
    tables = Markup("\n").join(_table(task, group) for task, group in groups.items())
    notes = Markup().join(paragraph(note) for note in about.get("notes", ()))
    sections = [
        ("At a glance", paragraph(_KEY) + Markup('<div class="plots">\n{}\n</div>').format(plots)),
        ("Numbers", tables + notes),
        ("Settings", preformatted(json.dumps(about, indent=1, default=str))),
    ]
    return page(title, sections, Markup(_STYLE))


def _heading(task: tuple[str, int, int]) -> str:
    return f"{task[0]}, {task[1]}-way {task[2]}-shot"


def _plot(task: tuple[str, int, int], group: Sequence[tuple[dict, dict]]) -> Markup:
    """One line for each method: a mark at its difference to `frozen`, its interval, its accuracy in figures."""
    ends = [row["delta_vs_frozen"] + sign * row["delta_ci95"] for row, _ in group for sign in (-1, 1)]
    step = _step(max(max(ends), 0) - min(min(ends), 0))
    low, high = math.floor(min(min(ends), 0) / step) * step, math.ceil(max(max(ends), step) / step) * step

    def x(value: float) -> float:
        return _LEFT + (_RIGHT - _LEFT) * (value - low) / (high - low)

    grid = []
    for number in range(round((high - low) / step) + 1):
        at = low + number * step
        kind = "zero" if abs(at) < step / 2 else "grid"
        grid.append({"kind": kind, "x": f"{x(at):.1f}", "figure": f"{at:+g}"})
    rows = []
    for number, (row, detail) in enumerate(group):
        y, mean, half = 8 + _LINE * number + _LINE / 2, row["delta_vs_frozen"], row["delta_ci95"]
        rows.append(
            {
                "y": y,
                "name": shown_name(detail),
                "whisker": f"M{x(mean - half):.1f} {y}H{x(mean + half):.1f}",
                "mark": _mark(detail, x(mean), y),
                "full": detail["kind"] == "meta-lora",
                "figure": f"{row['accuracy']:.1f} ± {row['ci95']:.1f}",
            }
        )
    sizes = {"left": _LEFT, "width": _WIDTH, "bottom": 8 + _LINE * len(group)}
    return render("plot.html", heading=_heading(task), grid=grid, rows=rows, **sizes)


def _mark(detail: dict[str, Any], x: float, y: float) -> str:
    """Shapes tell kinds apart, so that no colour has to: a path's outline."""
    if detail["transductive"]:
        return f"M{x:.1f} {y - 6}l6 6l-6 6l-6 -6z"
    if detail["kind"] == "tuned":
        return f"M{x:.1f} {y - 6}l6 11h-12z"
    if detail["kind"] == "meta-lora":
        return f"M{x - 5:.1f} {y - 5}h10v10h-10z"
    return f"M{x - 5:.1f} {y}a5 5 0 1 0 10 0a5 5 0 1 0 -10 0"


def _step(span: float) -> float:
    """A round distance of grid lines: about four to a plot."""
    rough = max(span, 0.1) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)


def _table(task: tuple[str, int, int], group: Sequence[tuple[dict, dict]]) -> Markup:
    header = ("method", "episodes", "accuracy", "vs frozen", "vs average", "vs best baseline", "s/task", "MB", "pool")
    rows = []
    for row, detail in group:
        cells = [shown_name(detail), row["episodes"], f"{row['accuracy']:.2f} ± {row['ci95']:.2f}"]
        cells.append(f"{row['delta_vs_frozen']:+.2f} ± {row['delta_ci95']:.2f}")
        for baseline in ("average", "best_rival"):
            cells.append(f"{detail[f'delta_vs_{baseline}']:+.2f} ± {detail[f'delta_vs_{baseline}_ci95']:.2f}")
        rows.append([*cells, f"{detail['seconds_per_task']:g}", f"{detail['peak_memory_mb']:g}", detail["pool"]])
    best = ", ".join(dict.fromkeys(detail["best_rival"] for _, detail in group))
    return table(f"{_heading(task)}, per cent; best baseline: {best}", header, rows)
