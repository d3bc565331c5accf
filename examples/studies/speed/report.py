"""Rows and ratios of a run as text, as Markdown and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any


HEADER = ("step", "steps/s", "images/s", "GFLOPs/image", "of achievable", "peak MB")


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    flops = row["gflops_per_image"]
    return (
        row["name"],
        f"{row['steps_per_second']:.3g}",
        f"{row['images_per_second']:.3g}",
        f"{flops:.2f}" if flops else "-",
        f"{row['share_of_achievable']:.0%}" if flops else "-",
        f"{row['peak_memory_mb']:.1f}" if flops else "-",
    )


def text_table(rows: Sequence[dict[str, Any]]) -> str:
    """Aligned columns."""
    lines = [HEADER, *(cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    shown = [
        [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))]
        for line in lines
    ]
    return "\n".join("  ".join(line) for line in shown)


def markdown(result: dict[str, Any]) -> str:
    """The machine, the rows, the ratios and what each step spends its time in."""
    known, setting = result["machine"], result["setting"]
    versions = ", ".join(f"{name} {known[name]}" for name in ("torch", "transformers", "peft", "lora_recycle"))
    lines = [
        f"{known['device']}, {known['threads']} threads, {versions}; {setting['backbone']}, {setting['dtype']}, "
        f"{setting['rounds']} rounds. A large matrix product: {result['achievable_gflops']:.0f} GFLOP/s.",
        "",
        "| " + " | ".join(HEADER) + " |",
        "|---|" + "---:|" * (len(HEADER) - 1),
        *("| " + " | ".join(cells(row)) + " |" for row in result["rows"]),
        "",
        "| ratio | times |",
        "|---|---:|",
        *(f"| {ratio['name']} | {ratio['ratio']:.2f} |" for ratio in result["ratios"]),
    ]
    profiled = [row for row in result["rows"] if "operations" in row]
    if profiled:
        lines += ["", "| step | where its time goes |", "|---|---|"]
        for row in profiled:
            shares = ", ".join(f"{name} {share:.0%}" for name, share in row["operations"].items())
            lines.append(f"| {row['name']} | {shares} |")
    return "\n".join(lines)


_STYLE = (
    "svg{background:#fff}text{font:12px system-ui,sans-serif;fill:#1d2329}.axis{stroke:#9aa7b4;fill:none}"
    ".ideal{stroke:#57606a;stroke-dasharray:4 4;fill:none}.line{stroke:#0b63b5;stroke-width:2;fill:none}"
    ".dot{fill:#0b63b5}.other{fill:#b5520b}"
)


def plot(result: dict[str, Any]) -> str:
    """Throughput against the share of patch tokens that are forwarded, beside the ideal line: an SVG page."""
    lines = {}
    for stage in ("distillation_masked_", "inversion_p"):
        rows = [row for row in result["rows"] if row["name"].startswith(stage)]
        rows.sort(key=lambda row: -row["keep_ratio"])
        lines[stage.split("_")[0]] = [
            (row["keep_ratio"], row["images_per_second"] / rows[0]["images_per_second"]) for row in rows
        ]
    points = [point for line in lines.values() for point in line]
    top = max([4.0, *(speed for _, speed in points)])

    def at(kept: float, speed: float) -> str:
        return f"{60 + 400 * (1 - kept) / 0.75:.1f},{270 - 240 * (speed - 1) / (top - 1):.1f}"

    ideal = " ".join(at(kept / 100, 100 / kept) for kept in range(25, 101, 5))
    marks = [f'<polyline class="ideal" points="{ideal}"/>']
    for number, (name, line) in enumerate(lines.items()):
        kind = "dot" if number == 0 else "other"
        marks.append(f'<polyline class="line" points="{" ".join(at(*point) for point in line)}"/>' if line else "")
        for point in line:
            x, y = at(*point).split(",")
            marks.append(f'<circle class="{kind}" cx="{x}" cy="{y}" r="4"/>')
            marks.append(f'<text x="{float(x) + 8:.1f}" y="{float(y) + 14:.1f}">{point[1]:.2f}</text>')
        marks.append(f'<circle class="{kind}" cx="80" cy="{34 + 20 * number}" r="4"/>')
        marks.append(f'<text x="90" y="{38 + 20 * number}">{name}</text>')
    ticks = "".join(
        f'<text x="{at(kept, 1).split(",")[0]}" y="288" text-anchor="middle">{kept:.0%}</text>'
        for kept in (1, 0.75, 0.5, 0.25)
    )
    title = f"{result['setting']['backbone']}, {result['setting']['dtype']}, {result['machine']['device']}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 520 325" role="img" aria-label="{escape(title)}">'
        f'<style>{_STYLE}</style><path class="axis" d="M60 20V270H470"/>'
        '<text x="54" y="274" text-anchor="end">1x</text>'
        f'<text x="54" y="34" text-anchor="end">{top:g}x</text>{"".join(marks)}{ticks}'
        f'<text x="60" y="306">share of patch tokens forwarded, mean over layers; dashed: ideal</text>'
        f'<text x="60" y="320">{escape(title)}</text></svg>\n'
    )
