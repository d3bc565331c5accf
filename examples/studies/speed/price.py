"""What the speed-ups cost, as `examples/studies/efficiency.py` measured it: a table and curves."""

from __future__ import annotations

import math
from typing import Any


SPLITS = ("validation", "test")
_COLOURS = {"plain": "#b5520b", "multi": "#0b63b5"}


def pair(row: dict[str, Any], key: str) -> str:
    """1-shot / 5-shot: mean with its 95% interval; differences with their sign."""
    sign = "+" if key.startswith("delta") else ""
    return " / ".join(f"{row[f'{key} {k}'][0]:{sign}.1f} ± {row[f'{key} {k}'][1]:.1f}" for k in (1, 5))


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for each variant, accuracies on both splits, differences to its reference."""
    lines = [
        "| variant | images' iterations | inversion, s | right by its adapter | from zero, validation | against the "
        "reference | from the average, validation | against the reference | the same on test |",
        "|---|---:|---:|---:|---|---|---|---|---|",
    ]
    for row in rows:
        if "image_iterations" not in row:  # untrained: frozen and average
            shown = pair(row, "average cifar_fs/validation")
            lines.append(f"| *{row['name']}* | | | | | | {shown} | | {pair(row, 'average cifar_fs/test')} |")
            continue
        cells = [row["name"], f"{row['image_iterations']:,}", f"{row['inversion_seconds']:.0f}"]
        cells.append(f"{row['surrogate_accuracy']:.0%}")
        for init in ("zero", "average"):
            cells += [pair(row, f"{init} cifar_fs/validation"), pair(row, f"delta {init} cifar_fs/validation")]
        lines.append("| " + " | ".join([*cells, pair(row, "delta average cifar_fs/test")]) + " |")
    return "\n".join(lines)


def curves(rows: list[dict[str, Any]]) -> str:
    """1-shot validation accuracy from zero against image-iterations and against seconds, both on log scales: SVG."""
    shown = {kind: [row for row in rows if row["name"].startswith(kind)] for kind in _COLOURS}
    for kind in shown:
        plain = [row for row in shown[kind] if row["name"].endswith("iterations") and row["image_iterations"]]
        shown[kind] = sorted(plain, key=lambda row: row["image_iterations"])
    heights = [row["zero cifar_fs/validation 1"] for line in shown.values() for row in line]
    low, high = min(m - c for m, c in heights) - 0.2, max(m + c for m, c in heights) + 0.2
    panels = [_panel(shown, "image_iterations", "iterations of all images", 60, low, high)]
    panels.append(_panel(shown, "inversion_seconds", "seconds of inversion", 400, low, high))
    legend = "".join(
        f'<circle cx="{70 + 190 * i}" cy="14" r="4" fill="{colour}"/><text x="{80 + 190 * i}" y="18">{name}</text>'
        for i, (name, colour) in enumerate(
            (("plain Adam on pixels, from noise", "#b5520b"), ("multi-resolution, from dead leaves", "#0b63b5"))
        )
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 300" role="img" '
        'aria-label="Accuracy against the work of inversion"><style>svg{background:#fff}'
        "text{font:12px system-ui,sans-serif;fill:#1d2329}.axis{stroke:#9aa7b4;fill:none}</style>"
        f"{legend}{''.join(panels)}</svg>\n"
    )


def _panel(shown: dict[str, list[dict]], key: str, label: str, left: float, low: float, high: float) -> str:
    values = [row[key] for line in shown.values() for row in line]
    first, last = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))

    def x(value: float) -> float:
        return left + 270 * (math.log10(value) - first) / (last - first)

    def y(accuracy: float) -> float:
        return 250 - 210 * (accuracy - low) / (high - low)

    marks = [f'<path class="axis" d="M{left} 30V250H{left + 280}"/><text x="{left}" y="290">{label}</text>']
    for power in range(first, last + 1):
        marks.append(f'<text x="{x(10**power):.0f}" y="268" text-anchor="middle">{10**power:g}</text>')
    for accuracy in range(math.ceil(low), math.floor(high) + 1):
        marks.append(f'<text x="{left - 6}" y="{y(accuracy) + 4:.0f}" text-anchor="end">{accuracy}</text>')
    for kind, line in shown.items():
        points = " ".join(f"{x(row[key]):.1f},{y(row['zero cifar_fs/validation 1'][0]):.1f}" for row in line)
        marks.append(f'<polyline points="{points}" fill="none" stroke="{_COLOURS[kind]}" stroke-width="2"/>')
        for row in line:
            mean, half = row["zero cifar_fs/validation 1"]
            at = f"{x(row[key]):.1f}"
            marks.append(f'<circle cx="{at}" cy="{y(mean):.1f}" r="4" fill="{_COLOURS[kind]}"/>')
            bar = f"M{at} {y(mean - half):.1f}V{y(mean + half):.1f}"
            marks.append(f'<path d="{bar}" stroke="{_COLOURS[kind]}" fill="none"/>')
    return "".join(marks)
