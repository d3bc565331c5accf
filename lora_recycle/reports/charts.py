"""Charts as inline SVG that say in words, shapes or hatching what they also say in colour."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import torch


_CURVE_POINTS = 300  # longer curves are averaged down to so many points
_MAP_WIDTH, _MAP_HEIGHT, _MAP_RIM = 400, 300, 12
#: Marker outlines around a point, one for each kind: a circle and a cross.
_MARKS = ("m-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0", "m-3.5 -3.5l7 7m0 -7l-7 7")


def charts(figures: Sequence[str]) -> str:
    """Charts side by side where there is room."""
    return f'<div class="charts">\n{"".join(figures)}\n</div>' if figures else ""


def curve(name: str, values: Sequence[float], steps: Sequence[int] | None = None, chosen: int | None = None) -> str:
    """One number over the steps, as a line with its range and its last value written out.

    Args:
        values: of the steps from 1 on, or of those in `steps`, from the first, which is 0, to the last.
        chosen: one of `steps`, which gets a mark.
    """
    if steps is None:
        points, last = _averaged([float(value) for value in values]), max(len(values) - 1, 1)
    else:
        points, last = [(x, y) for x, y in zip(steps, values, strict=True) if math.isfinite(y)], max(steps[-1], 1)
    if not points:
        return f"<figure><figcaption>{escape(name)}: no finite values</figcaption></figure>"
    low, high = min(y for _, y in points), max(y for _, y in points)
    span = (high - low) or 1.0
    places = {x: (60 + 330 * x / last, 120 - 105 * (y - low) / span) for x, y in points}
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places.values())
    count = len(values) if steps is None else last
    summary, mark = f"{escape(name)}: {points[0][1]:.4g} to {points[-1][1]:.4g} in {count} steps", ""
    if chosen in places:
        x, y = places[chosen]
        summary += f"; the circle, step {chosen}, is kept"
        mark = f'<path class="mark" d="M{x:.1f} {y:.1f}{_MARKS[0]}"/>'
    return (
        f'<figure><figcaption>{summary}</figcaption><svg viewBox="0 0 400 142" role="img" aria-label="{summary}">'
        '<path class="axis" d="M60 10V125H392" fill="none"/>'
        f'<text x="54" y="19" text-anchor="end">{_figure(high)}</text>'
        f'<text x="54" y="124" text-anchor="end">{_figure(low)}</text><text x="60" y="140">{0 if steps else 1}</text>'
        f'<text x="390" y="140" text-anchor="end">{count}</text>'
        f'<polyline class="curve" points="{line}"/>{mark}</svg></figure>'
    )


def _figure(value: float) -> str:
    """Three digits, zeros at the end among them."""
    return f"{value:#.3g}".rstrip(".")


def _averaged(values: list[float]) -> list[tuple[float, float]]:
    """(step, value) points, neighbours averaged where there are many, values that are not finite left out."""
    width = max(1, math.ceil(len(values) / _CURVE_POINTS))
    points = []
    for start in range(0, len(values), width):
        finite = [value for value in values[start : start + width] if math.isfinite(value)]
        if finite:
            middle = start + (min(width, len(values) - start) - 1) / 2
            points.append((middle, sum(finite) / len(finite)))
    return points


def bars(group: Sequence[Mapping[str, Any]]) -> str:
    """Horizontal accuracy bars of the methods on one data set and number of shots; `meta-lora` is hatched."""
    first = group[0]
    heading = escape(f"{first['data']}, {first['ways']}-way {first['shots']}-shot")
    top = min(100.0, 10.0 * math.ceil(max(row["accuracy"] + row["ci95"] for row in group) / 10)) or 10.0
    scale = 185 / top
    marks = []
    for number, row in enumerate(group):
        y, strong = 10 + 24 * number, row["method"] == "meta-lora"
        low, high = (max(0.0, row["accuracy"] + sign * row["ci95"]) * scale for sign in (-1, 1))
        weight = ' class="strong"' if strong else ""
        marks.append(
            f'<text x="104" y="{y + 12}" text-anchor="end"{weight}>{escape(row["method"])}</text>'
            f'<rect class="bar{" best" if strong else ""}" x="110" y="{y}" width="{row["accuracy"] * scale:.1f}" '
            f'height="16"/><path class="error" d="M{110 + low:.1f} {y + 8}H{110 + high:.1f}'
            f'M{110 + low:.1f} {y + 4}v8M{110 + high:.1f} {y + 4}v8"/>'
            f'<text x="398" y="{y + 12}" text-anchor="end"{weight}>{row["accuracy"]:.1f} ± {row["ci95"]:.1f}</text>'
        )
    bottom, chance = 10 + 24 * len(group), 110 + 100 / first["ways"] * scale
    return (
        f'<figure><figcaption>{heading}, per cent</figcaption><svg viewBox="0 0 400 {bottom + 18}" role="img" '
        f'aria-label="accuracy on {heading}"><path class="axis" d="M110 4V{bottom}H295" fill="none"/>{"".join(marks)}'
        f'<path class="chance" d="M{chance:.1f} 4V{bottom}"/><text x="110" y="{bottom + 15}">0</text>'
        f'<text x="295" y="{bottom + 15}" text-anchor="end">{top:g}</text></svg></figure>'
    )


def scatter(heading: str, points: torch.Tensor, labels: Sequence[str], kinds: Sequence[str]) -> str:
    """A map: each kind of point has its own marker, each point a line to the middle of its class.

    Args:
        points: (N, 2).
        labels: N class names; a class is a name within a kind.
        kinds: N names of at most two kinds.
    """
    low, high = points.min(0).values, points.max(0).values
    size = torch.tensor([_MAP_WIDTH - 2 * _MAP_RIM, _MAP_HEIGHT - 2 * _MAP_RIM])
    scale = (size / (high - low).clamp_min(1e-9)).min()  # the same for both axes: distances are meant
    placed = (points - (low + high) / 2) * scale * torch.tensor([1.0, -1.0])
    placed = placed + torch.tensor([_MAP_WIDTH / 2, _MAP_HEIGHT / 2])
    members: dict[tuple[str, str], list[int]] = {}
    for number, key in enumerate(zip(kinds, labels, strict=True)):
        members.setdefault(key, []).append(number)
    names, spokes, marks = list(dict.fromkeys(kinds)), [], []
    for (kind, label), numbers in members.items():
        x, y = placed[numbers].mean(0).tolist()
        second = " second" if names.index(kind) else ""
        for px, py in placed[numbers].tolist():
            spokes.append(f"M{x:.1f} {y:.1f}L{px:.1f} {py:.1f}")
            marks.append(
                f'<path class="mark{second}" d="M{px:.1f} {py:.1f}{_MARKS[names.index(kind)]}">'
                f"<title>{escape(label)}</title></path>"
            )
    legend = "; ".join(f"{mark}: {escape(name)}" for mark, name in zip(("circles", "crosses"), names, strict=False))
    return (
        f"<figure><figcaption>{escape(heading)} ({legend})</figcaption>"
        f'<svg viewBox="0 0 {_MAP_WIDTH} {_MAP_HEIGHT}" role="img" aria-label="{escape(heading)}">'
        f'<path class="spoke" d="{"".join(spokes)}"/>{"".join(marks)}</svg></figure>'
    )
