"""The report page: one HTML file that holds everything it shows and needs no network."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import torch
from PIL import Image

from ..errors import DataError
from ..storage import atomic_write


_CURVE_POINTS = 300  # longer loss curves are averaged down to so many points
_DIMMED = 0.2  # brightness of the patches that were pruned

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
:root { color-scheme: light dark; --ink: #1d2329; --soft: #57606a; --line: #d0d7de; --page: #fff; --panel: #f6f8fa;
  --bar: #9aa7b4; --best: #0b63b5; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9da7b1; --line: #3d444d; --page: #0d1117;
  --panel: #161b22; --bar: #5b6671; --best: #58a6ff; } }
body { margin: 0 auto; max-width: 62rem; padding: 1rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; } p { color: var(--soft); }
figure { margin: 0; } figcaption { font-size: .8rem; overflow-wrap: anywhere; }
.images { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: .8rem; }
.images div { display: flex; gap: 2px; }
.images img { flex: 1; min-width: 0; max-width: 50%; aspect-ratio: 1; image-rendering: pixelated; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1rem; }
.charts figure { background: var(--panel); border: 1px solid var(--line); border-radius: 6px; padding: .6rem; }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--ink); font: 12px system-ui, sans-serif; }
.axis { stroke: var(--line); } .curve { fill: none; stroke: var(--best); stroke-width: 1.5; }
.bar { fill: var(--bar); } .bar.best { fill: var(--best); }
.error { fill: none; stroke: var(--ink); stroke-width: 1.5; }
.chance { stroke: var(--soft); stroke-dasharray: 3 3; } svg text.strong { font-weight: 700; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); }
th, td { padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
th:nth-child(-n+3), td:nth-child(-n+3) { text-align: left; }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: 6px; padding: .8rem; overflow-x: auto; }
</style>
</head>
<body>
<main>
<h1>$title</h1>
$sections
</main>
</body>
</html>
""")


def write_report(
    path: str | Path,
    *,
    title: str,
    rows: Sequence[dict[str, Any]],
    losses: dict[str, list[float]],
    surrogate_images: torch.Tensor,
    surrogate_labels: Sequence[str],
    kept_tokens: torch.Tensor | None = None,
    patch_size: int,
    config: dict[str, Any],
    usage: str,
) -> Path:
    """Write the page atomically and return its path.

    Args:
        rows (`Sequence[dict]`): rows of `evaluation.protocol.summarise`.
        losses (`dict[str, list[float]]`): one curve a name, one value a step.
        surrogate_images (`torch.Tensor`): uint8 (N, 3, H, W), the images to show.
        surrogate_labels (`Sequence[str]`): N class names.
        kept_tokens (`torch.Tensor`, *optional*): (N, K) patch numbers kept, row by row from 0, [CLS] not counted;
            negative numbers are padding.
        patch_size (`int`): side of a patch in pixels.
        config (`dict`): settings to print.
        usage (`str`): the Python lines that use the result.

    Raises:
        DataError: images, labels and masks do not match.
    """
    _check(surrogate_images, surrogate_labels, kept_tokens)
    sections = [
        ("Accuracy on real images", _bar_charts(rows) + _table(rows)),
        ("Surrogate images", _gallery(surrogate_images, surrogate_labels, kept_tokens, patch_size)),
        ("Losses", f'<div class="charts">{"".join(_curve(name, values) for name, values in losses.items())}</div>'),
        ("Use it", f"<pre><code>{escape(usage)}</code></pre>"),
        ("Settings", f"<pre>{escape(json.dumps(config, indent=2, default=str))}</pre>"),
    ]
    body = "\n".join(f"<section>\n<h2>{heading}</h2>\n{content}\n</section>" for heading, content in sections)
    atomic_write(Path(path), _PAGE.substitute(title=escape(title), sections=body).encode())
    return Path(path)


def _check(images: torch.Tensor, labels: Sequence[str], kept: torch.Tensor | None) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise DataError(f"surrogate images must be uint8 (N, 3, H, W), got {images.dtype} {tuple(images.shape)}.")
    masks = len(images) if kept is None else len(kept)
    if not len(images) == len(labels) == masks:
        raise DataError(f"{len(images)} surrogate images, {len(labels)} labels and {masks} masks do not match.")


def _gallery(images: torch.Tensor, labels: Sequence[str], kept: torch.Tensor | None, patch_size: int) -> str:
    """A grid of images with their class names, each beside its kept patches where known."""
    figures = []
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        shown = f'<img src="{_png(image)}" alt="surrogate image of {escape(label)}">'
        if kept is not None:
            shown += f'<img src="{_png(_dim(image, kept[number], patch_size))}" alt="its kept patches">'
        figures.append(f"<figure><div>{shown}</div><figcaption>{escape(label)}</figcaption></figure>")
    note = "Made from the adapters alone. " if kept is None else "Made from the adapters alone; right: patches kept. "
    return f'<p>{note}{len(images)} images.</p>\n<div class="images">\n{"".join(figures)}\n</div>'


def _dim(image: torch.Tensor, kept: torch.Tensor, patch_size: int) -> torch.Tensor:
    """(3, H, W) image with all but the (K,) kept patches darkened."""
    rows, columns = image.shape[1] // patch_size, image.shape[2] // patch_size
    kept = kept.long()
    brightness = torch.full((rows * columns,), _DIMMED)
    brightness[kept[(kept >= 0) & (kept < rows * columns)]] = 1.0
    mask = brightness.view(rows, columns).repeat_interleave(patch_size, 0).repeat_interleave(patch_size, 1)
    full = torch.full(image.shape[1:], _DIMMED)  # a rim narrower than a patch is no token
    full[: mask.shape[0], : mask.shape[1]] = mask
    return (image * full).to(torch.uint8)


def _png(image: torch.Tensor) -> str:
    """(3, H, W) uint8 image as a PNG data URI."""
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy()).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _curve(name: str, values: Sequence[float]) -> str:
    """One loss curve as an SVG line with its range and its last value written out."""
    points = _averaged([float(value) for value in values])
    if not points:
        return f"<figure><figcaption>{escape(name)}: no finite values</figcaption></figure>"
    low, high = min(y for _, y in points), max(y for _, y in points)
    steps, span = max(len(values) - 1, 1), (high - low) or 1.0
    line = " ".join(f"{60 + 330 * x / steps:.1f},{120 - 105 * (y - low) / span:.1f}" for x, y in points)
    summary = f"{escape(name)}: {points[0][1]:.4g} to {points[-1][1]:.4g} in {len(values)} steps"
    return (
        f'<figure><figcaption>{summary}</figcaption><svg viewBox="0 0 400 142" role="img" aria-label="{summary}">'
        '<path class="axis" d="M60 10V125H392" fill="none"/>'
        f'<text x="54" y="19" text-anchor="end">{high:.3g}</text><text x="54" y="124" text-anchor="end">{low:.3g}'
        f'</text><text x="60" y="140">1</text><text x="390" y="140" text-anchor="end">{len(values)}</text>'
        f'<polyline class="curve" points="{line}"/></svg></figure>'
    )


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


def _bar_charts(rows: Sequence[dict[str, Any]]) -> str:
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["data"], row["ways"], row["shots"]), []).append(row)
    charts = "".join(_bars(group) for group in groups.values())
    return f'<p>Lines on the bars: 95% intervals. Dashed: chance.</p>\n<div class="charts">\n{charts}\n</div>'


def _bars(group: Sequence[dict[str, Any]]) -> str:
    """Horizontal accuracy bars of the methods on one data set and number of shots."""
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


def _table(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        delta = "" if row["method"] == "frozen" else f"{row['delta_vs_frozen']:+.2f} ± {row['delta_ci95']:.2f}"
        cells = (row["method"], row["data"], f"{row['ways']}-way {row['shots']}-shot", row["episodes"])
        cells = (*cells, f"{row['accuracy']:.2f} ± {row['ci95']:.2f}", delta)
        lines.append("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in cells) + "</tr>")
    names = ("method", "data", "task", "episodes", "accuracy", "vs frozen")
    header = "".join(f'<th scope="col">{name}</th>' for name in names)
    return (
        '\n<div class="scroll"><table><caption>Per cent, with 95% intervals; differences are paired.</caption>'
        f"<thead><tr>{header}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )
