"""The figure of an ablation: paired differences to the frozen backbone, one panel for each task, no colour needed."""

from html import escape
from pathlib import Path
from typing import Any

from lora_recycle.runtime.files import atomic_write


#: method: its mark and the dashes of its line
STYLES = {"average": ("circle", "2 3"), "from zero": ("triangle", "6 3"), "from average": ("square", "")}
_WIDTH, _HEIGHT, _LEFT, _TOP, _PLOT_WIDTH, _PLOT_HEIGHT = 360, 250, 46, 34, 300, 150


def draw(result: dict[str, Any], path: Path) -> None:
    """Write the SVG of a study's summary."""
    tasks = list(dict.fromkeys(task for point in result["points"] for task in point["tasks"]))
    columns = min(2, len(tasks))
    rows = -(-len(tasks) // columns)
    panels = []
    for i, task in enumerate(tasks):
        at = (i % columns * _WIDTH, 24 + i // columns * _HEIGHT)
        panels.append(f'<g transform="translate({at[0]} {at[1]})">{_panel(result, task)}</g>')
    size = columns * _WIDTH, 24 + rows * _HEIGHT
    legend, x = [], _LEFT
    for method, (shape, dashes) in STYLES.items():
        legend.append(f'<path class="line" stroke-dasharray="{dashes}" d="M{x} 14h30"/>{_mark(shape, x + 15, 14)}')
        legend.append(f'<text x="{x + 36}" y="18">{escape(method)}</text>')
        x += 110
    style = (
        "text{font:11px sans-serif;fill:#222}.line{fill:none;stroke:#222;stroke-width:1.4}.axis{stroke:#999;fill:none}"
        ".mark{fill:#fff;stroke:#222;stroke-width:1.4}.whisker{stroke:#222}"
    )
    label = escape(f"differences to the frozen backbone by {result['axis']}")
    text = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]} {size[1]}" role="img" aria-label="{label}">'
        f'<style>{style}</style><rect width="100%" height="100%" fill="#fff"/>'
        f"{''.join(legend)}{''.join(panels)}</svg>\n"
    )
    atomic_write(path, text.encode())


def _panel(result: dict[str, Any], task: str) -> str:
    points = [point for point in result["points"] if task in point["tasks"]]
    ends = [
        mean + sign * half
        for point in points
        for method in STYLES
        for mean, half in [point["tasks"][task][method]["vs frozen"]]
        for sign in (-1, 1)
    ]
    low, high = min([0.0, *ends]), max([0.5, *ends])

    def y(value: float) -> float:
        return _TOP + _PLOT_HEIGHT * (high - value) / (high - low)

    parts = [f'<text x="{_LEFT}" y="{_TOP - 10}">{escape(task)}, points above frozen</text>']
    parts.append(f'<path class="axis" d="M{_LEFT} {_TOP}v{_PLOT_HEIGHT}M{_LEFT} {y(0):.1f}h{_PLOT_WIDTH}"/>')
    for value in dict.fromkeys((low, 0.0, high)):
        parts.append(f'<text x="{_LEFT - 5}" y="{y(value) + 4:.1f}" text-anchor="end">{value:+.1f}</text>')
    step = _PLOT_WIDTH / len(points)
    for i, point in enumerate(points):
        x, at = _LEFT + step * (i + 0.5), _TOP + _PLOT_HEIGHT + 14
        turned = (
            f' transform="rotate(-20 {x:.1f} {at})" text-anchor="end"' if _long(points) else ' text-anchor="middle"'
        )
        parts.append(f'<text x="{x:.1f}" y="{at}"{turned}>{escape(point["name"])}</text>')
    parts.append(f'<text x="{_LEFT}" y="{_HEIGHT - 6}">{escape(result["axis"])}</text>')
    for shift, (method, (shape, dashes)) in zip((-4, 0, 4), STYLES.items(), strict=True):
        found = [point["tasks"][task][method]["vs frozen"] for point in points]
        xs = [_LEFT + step * (i + 0.5) + shift for i in range(len(points))]
        line = " ".join(f"{x:.1f},{y(mean):.1f}" for x, (mean, _) in zip(xs, found, strict=True))
        parts.append(f'<polyline class="line" stroke-dasharray="{dashes}" points="{line}"/>')
        for x, (mean, half) in zip(xs, found, strict=True):
            parts.append(f'<path class="whisker" d="M{x:.1f} {y(mean - half):.1f}V{y(mean + half):.1f}"/>')
            parts.append(_mark(shape, x, y(mean)))
    return "".join(parts)


def _long(points: list[dict[str, Any]]) -> bool:
    return sum(len(point["name"]) for point in points) > 36


def _mark(shape: str, x: float, y: float) -> str:
    if shape == "circle":
        return f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
    if shape == "square":
        return f'<rect class="mark" x="{x - 3.5:.1f}" y="{y - 3.5:.1f}" width="7" height="7"/>'
    return f'<path class="mark" d="M{x:.1f} {y - 5:.1f}l4.5 8h-9z"/>'
