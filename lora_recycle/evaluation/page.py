"""A benchmark as one HTML file that needs no network: plots of paired differences, and the tables."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape
from string import Template
from typing import Any

from .summary import shown_name


_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
:root { color-scheme: light dark; --ink: #1d2329; --soft: #57606a; --line: #d0d7de; --page: #fff; --panel: #f6f8fa; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9da7b1; --line: #3d444d; --page: #0d1117;
  --panel: #161b22; } }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; } p { color: var(--soft); max-width: 50rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 1rem; }
figure { margin: 0; background: var(--panel); border: 1px solid var(--line); border-radius: 6px; padding: .6rem; }
figcaption { font-weight: 600; }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--ink); font: 12px system-ui, sans-serif; }
.grid { stroke: var(--line); } .zero { stroke: var(--ink); stroke-dasharray: 4 3; }
.whisker { stroke: var(--ink); stroke-width: 1.5; }
.mark { stroke: var(--ink); stroke-width: 1.5; fill: var(--page); } .mark.full { fill: var(--ink); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); }
th, td { padding: .2rem .8rem .2rem 0; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child, th:last-child, td:last-child { text-align: left; }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: 6px; padding: .8rem; overflow-x: auto; }
</style>
</head>
<body>
<main>
<h1>$title</h1>
$body
</main>
</body>
</html>
""")

_KEY = (
    "Paired differences to class centres on the frozen backbone, in points of accuracy; lines are 95% intervals. "
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
    plots = "\n".join(_plot(task, group) for task, group in groups.items())
    tables = "\n".join(_table(task, group) for task, group in groups.items())
    notes = "".join(f"<p>{escape(note)}</p>" for note in about.get("notes", ()))
    body = (
        f'<section>\n<h2>At a glance</h2>\n<p>{escape(_KEY)}</p>\n<div class="plots">\n{plots}\n</div>\n</section>\n'
        f"<section>\n<h2>Numbers</h2>\n{tables}\n{notes}</section>\n"
        f"<section>\n<h2>Settings</h2>\n<pre>{escape(json.dumps(about, indent=1, default=str))}</pre>\n</section>"
    )
    return _PAGE.substitute(title=escape(title), body=body)


def _heading(task: tuple[str, int, int]) -> str:
    return f"{task[0]}, {task[1]}-way {task[2]}-shot"


def _plot(task: tuple[str, int, int], group: Sequence[tuple[dict, dict]]) -> str:
    """One line for each method: a mark at its difference to `frozen`, its interval, its accuracy in figures."""
    ends = [row["delta_vs_frozen"] + sign * row["delta_ci95"] for row, _ in group for sign in (-1, 1)]
    step = _step(max(max(ends), 0) - min(min(ends), 0))
    low, high = math.floor(min(min(ends), 0) / step) * step, math.ceil(max(max(ends), step) / step) * step

    def x(value: float) -> float:
        return _LEFT + (_RIGHT - _LEFT) * (value - low) / (high - low)

    bottom = 8 + _LINE * len(group)
    marks = []
    for number in range(round((high - low) / step) + 1):
        at = low + number * step
        kind = "zero" if abs(at) < step / 2 else "grid"
        marks.append(f'<path class="{kind}" d="M{x(at):.1f} 4V{bottom}"/>')
        marks.append(f'<text x="{x(at):.1f}" y="{bottom + 15}" text-anchor="middle">{at:+g}</text>')
    for number, (row, detail) in enumerate(group):
        y, mean, half = 8 + _LINE * number + _LINE / 2, row["delta_vs_frozen"], row["delta_ci95"]
        marks.append(f'<text x="{_LEFT - 10}" y="{y + 4}" text-anchor="end">{escape(shown_name(detail))}</text>')
        marks.append(f'<path class="whisker" d="M{x(mean - half):.1f} {y}H{x(mean + half):.1f}"/>')
        marks.append(_mark(detail, x(mean), y))
        figures = f"{row['accuracy']:.1f} ± {row['ci95']:.1f}"
        marks.append(f'<text x="{_WIDTH - 4}" y="{y + 4}" text-anchor="end">{figures}</text>')
    label = escape(f"differences to frozen on {_heading(task)}; the table below has the numbers")
    return (
        f'<figure><figcaption>{escape(_heading(task))}</figcaption><svg viewBox="0 0 {_WIDTH} {bottom + 20}" '
        f'role="img" aria-label="{label}">{"".join(marks)}</svg></figure>'
    )


def _mark(detail: dict[str, Any], x: float, y: float) -> str:
    """Shapes tell kinds apart, so that no colour has to."""
    if detail["transductive"]:
        return f'<path class="mark" d="M{x:.1f} {y - 6}l6 6l-6 6l-6 -6z"/>'
    if detail["kind"] == "tuned":
        return f'<path class="mark" d="M{x:.1f} {y - 6}l6 11h-12z"/>'
    if detail["kind"] == "meta-lora":
        return f'<rect class="mark full" x="{x - 5:.1f}" y="{y - 5}" width="10" height="10"/>'
    return f'<circle class="mark" cx="{x:.1f}" cy="{y}" r="5"/>'


def _step(span: float) -> float:
    """A round distance of grid lines: about four to a plot."""
    rough = max(span, 0.1) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)


def _table(task: tuple[str, int, int], group: Sequence[tuple[dict, dict]]) -> str:
    header = ("method", "episodes", "accuracy", "vs frozen", "vs average", "vs best rival", "s/task", "MB", "pool")
    lines = []
    for row, detail in group:
        cells = [shown_name(detail), row["episodes"], f"{row['accuracy']:.2f} ± {row['ci95']:.2f}"]
        cells.append(f"{row['delta_vs_frozen']:+.2f} ± {row['delta_ci95']:.2f}")
        for rival in ("average", "best_rival"):
            cells.append(f"{detail[f'delta_vs_{rival}']:+.2f} ± {detail[f'delta_vs_{rival}_ci95']:.2f}")
        cells += [f"{detail['seconds_per_task']:g}", f"{detail['peak_memory_mb']:g}", detail["pool"]]
        lines.append("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in cells) + "</tr>")
    names = "".join(f'<th scope="col">{name}</th>' for name in header)
    best = ", ".join(dict.fromkeys(detail["best_rival"] for _, detail in group))
    return (
        f'<div class="scroll"><table><caption>{escape(_heading(task))}, per cent; best rival: {escape(best)}</caption>'
        f"<thead><tr>{names}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )
