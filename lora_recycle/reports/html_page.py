"""The frame of every page: style for screens light and dark, for phones and for paper; nothing is fetched."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

from ..runtime.files import atomic_write
from ..runtime.terminal import utf8


_GENERATOR = '<meta name="generator" content="lora-recycle">'
_PAGE = Template(
    f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
{_GENERATOR}
"""
    """<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
:root { color-scheme: light dark; --ink: #1d2329; --soft: #57606a; --line: #d0d7de; --page: #fff; --panel: #f6f8fa;
  --bar: #9aa7b4; --best: #0b63b5; --other: #a24a00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9da7b1; --line: #3d444d; --page: #0d1117;
  --panel: #161b22; --bar: #5b6671; --best: #58a6ff; --other: #ffa657; } }
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
svg.patterns { position: absolute; width: 0; height: 0; } .hatch { stroke: var(--page); stroke-width: 2; }
.ground { fill: var(--best); } .axis { stroke: var(--line); }
.curve { fill: none; stroke: var(--best); stroke-width: 1.5; }
.bar { fill: var(--bar); } .bar.best { fill: url(#hatched); }
.error { fill: none; stroke: var(--ink); stroke-width: 1.5; }
.chance { stroke: var(--soft); stroke-dasharray: 3 3; } svg text.strong { font-weight: 700; }
.spoke { stroke: var(--soft); stroke-width: .5; opacity: .5; }
.mark { fill: none; stroke: var(--best); stroke-width: 1.5; } .mark.second { stroke: var(--other); }
.images div img:only-child { max-width: 100%; }
.scroll { overflow-x: auto; margin-top: 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; min-width: min(100%, 30rem); }
caption { text-align: left; color: var(--soft); }
th, td { padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
th.text, td.text { text-align: left; }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: 6px; padding: .8rem; overflow-x: auto; }
@media (max-width: 40rem) { table { font-size: .85rem; } th, td { padding-right: .5rem; } }
@media print {
  :root { color-scheme: light; --ink: #000; --soft: #333; --line: #999; --page: #fff; --panel: #fff; --bar: #bbb;
    --best: #777; --other: #000; }
  body { max-width: none; padding: 0; font-size: 10pt; } .scroll { overflow: visible; }
  figure, tr, caption { break-inside: avoid; } h2, caption { break-after: avoid; }
  pre { break-inside: avoid; white-space: pre-wrap; overflow-wrap: anywhere; }
  .charts { grid-template-columns: 1fr 1fr; }
  .images { grid-template-columns: repeat(auto-fill, minmax(28mm, 1fr)); }
  .images img { print-color-adjust: exact; }
}
$style</style>
</head>
<body>
$patterns<main>
<h1>$title</h1>
$sections
</main>
</body>
</html>
"""
)

#: what `.bar.best` is filled with, once in a page
_PATTERNS = """<svg class="patterns" aria-hidden="true"><defs><pattern id="hatched" width="6" height="6"
 patternUnits="userSpaceOnUse" patternTransform="rotate(45)"><rect class="ground" width="6" height="6"/>
<path class="hatch" d="M0 0V6"/></pattern></defs></svg>
"""


def page(title: str, sections: Sequence[tuple[str, str]], style: str = "", patterns: str = "") -> str:
    """A page as HTML.

    Args:
        sections: headings and HTML, both ready for the page; sections without content are left out.
        style: CSS of this page alone, which comes after that of all.
        patterns: SVG that others of the page refer to.
    """
    body = "\n".join(f"<section>\n<h2>{head}</h2>\n{content}\n</section>" for head, content in sections if content)
    return _PAGE.substitute(title=escape(title), sections=body, style=style, patterns=patterns)


def write_page(path: str | Path, title: str, sections: Sequence[tuple[str, str]]) -> Path:
    """Write a page whose charts may hatch, atomically, and return its path."""
    atomic_write(Path(path), utf8(page(title, sections, patterns=_PATTERNS)))
    return Path(path)


def is_page(path: Path) -> bool:
    """Whether a file is a page that was written here."""
    with path.open("rb") as file:
        return _GENERATOR.encode() in file.read(1000)


def table(caption: str, header: Sequence[str], rows: Sequence[Sequence[object]], text_columns: int = 1) -> str:
    """A table whose first columns are text and whose other columns are numbers, escaped here."""

    def cells(tag: str, values: Sequence[object], attribute: str = "") -> str:
        kinds = [' class="text"' if column < text_columns else "" for column in range(len(values))]
        return "".join(
            f"<{tag}{attribute}{kind}>{escape(str(v))}</{tag}>" for kind, v in zip(kinds, values, strict=True)
        )

    lines = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    scope = ' scope="col"'
    name = escape(caption)
    return (  # a region that scrolls is to be reached by keyboard, and then needs a name
        f'\n<div class="scroll" tabindex="0" role="region" aria-label="{name}"><table><caption>{name}</caption>'
        f"<thead><tr>{cells('th', header, scope)}</tr></thead><tbody>{lines}</tbody></table></div>"
    )
