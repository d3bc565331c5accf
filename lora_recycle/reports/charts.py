"""Charts as inline SVG that say in words, shapes or hatching what they also say in colour."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from markupsafe import Markup

from .html_page import render


_CURVE_POINTS = 300  # longer curves are averaged down to so many points
_MAP_WIDTH, _MAP_HEIGHT, _MAP_RIM = 400, 300, 12
#: Marker outlines around a point, one for each kind: a circle and a cross.
_MARKS = ("m-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0", "m-3.5 -3.5l7 7m0 -7l-7 7")


def charts(figures: Sequence[Markup]) -> Markup:
    """Charts side by side where there is room."""
    return render("charts.html", figures=figures) if figures else Markup()


def curve(name: str, values: Sequence[float], steps: Sequence[int] | None = None, chosen: int | None = None) -> Markup:
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
        return render("curve.html", summary=f"{name}: no finite values", line="")
    low, high = min(y for _, y in points), max(y for _, y in points)
    span = (high - low) or 1.0
    places = {x: (60 + 330 * x / last, 120 - 105 * (y - low) / span) for x, y in points}
    count = len(values) if steps is None else last
    summary, mark = f"{name}: {points[0][1]:.4g} to {points[-1][1]:.4g} in {count} steps", None
    if chosen in places:
        x, y = places[chosen]
        summary += f"; the circle, step {chosen}, is kept"
        mark = f"M{x:.1f} {y:.1f}{_MARKS[0]}"
    return render(
        "curve.html",
        summary=summary,
        line=" ".join(f"{x:.1f},{y:.1f}" for x, y in places.values()),
        low=_figure(low),
        high=_figure(high),
        first=0 if steps else 1,
        last=count,
        mark=mark,
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


def bars(group: Sequence[Mapping[str, Any]]) -> Markup:
    """Horizontal accuracy bars of the methods on one data set and number of shots; `meta-lora` is hatched.

    The axis begins at the ten below the least interval, so that differences can be seen; it says where.
    """
    first = group[0]
    low = 10.0 * math.floor(max(0.0, min(row["accuracy"] - row["ci95"] for row in group)) / 10)
    top = min(100.0, 10.0 * math.ceil(max(row["accuracy"] + row["ci95"] for row in group) / 10)) or 10.0
    low = low if low < top else 0.0
    scale, bottom, chance = 185 / (top - low), 10 + 24 * len(group), 100 / first["ways"]
    return render(
        "bars.html",
        heading=f"{first['data']}, {first['ways']}-way {first['shots']}-shot",
        bars=[_bar(row, 10 + 24 * number, low, scale) for number, row in enumerate(group)],
        bottom=bottom,
        chance=f"M{110 + (chance - low) * scale:.1f} 4V{bottom}" if chance >= low else None,
        low=f"{low:g}",
        top=f"{top:g}",
    )


def _bar(row: Mapping[str, Any], y: int, start: float, scale: float) -> dict[str, Any]:
    low, high = (110 + max(0.0, row["accuracy"] + sign * row["ci95"] - start) * scale for sign in (-1, 1))
    return {
        "method": row["method"],
        "strong": row["method"] == "meta-lora",
        "y": y,
        "width": f"{(row['accuracy'] - start) * scale:.1f}",
        "error": f"M{low:.1f} {y + 8}H{high:.1f}M{low:.1f} {y + 4}v8M{high:.1f} {y + 4}v8",
        "figure": f"{row['accuracy']:.1f} ± {row['ci95']:.1f}",
    }


def scatter(heading: str, points: torch.Tensor, labels: Sequence[str], kinds: Sequence[str]) -> Markup:
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
    names, spokes, marks, middles = list(dict.fromkeys(kinds)), [], [], []
    for (kind, label), numbers in members.items():
        x, y = placed[numbers].mean(0).tolist()
        name = label.partition(" (")[0]
        middles.append({"x": f"{x:.1f}", "y": f"{y:.1f}", "name": name if len(name) <= 14 else f"{name[:13]}…"})
        for px, py in placed[numbers].tolist():
            spokes.append(f"M{x:.1f} {y:.1f}L{px:.1f} {py:.1f}")
            outline = f"M{px:.1f} {py:.1f}{_MARKS[names.index(kind)]}"
            marks.append({"outline": outline, "label": label, "second": names.index(kind) > 0})
    return render(
        "scatter.html",
        heading=heading,
        legend="; ".join(f"{mark}: {name}" for mark, name in zip(("circles", "crosses"), names, strict=False)),
        width=_MAP_WIDTH,
        height=_MAP_HEIGHT,
        spokes="".join(spokes),
        marks=marks,
        middles=middles,
    )
