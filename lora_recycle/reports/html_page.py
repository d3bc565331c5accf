"""The frame of every page: style for screens light and dark, for phones and for paper; nothing is fetched.

All markup is in `templates/`, where Jinja escapes what is put into it. A template gives `Markup`, which others take as
it is.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ..runtime.files import atomic_write
from ..runtime.terminal import utf8


_GENERATOR = Markup('<meta name="generator" content="lora-recycle">')


@functools.cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(template: str, **values: Any) -> Markup:
    """A file of `templates/` with all values escaped that are not `Markup` already."""
    return Markup(_environment().get_template(template).render(**values))  # noqa: S704 - escaped by the template


def page(title: str, sections: Sequence[tuple[str, str]], style: str = "", patterns: bool = False) -> str:
    """A page as HTML.

    Args:
        sections: headings and contents; sections without content are left out.
        style: CSS of this page alone, which comes after that of all.
        patterns: whether charts of the page are hatched.
    """
    frame = {"generator": _GENERATOR, "title": title, "style": style, "patterns": patterns}
    return str(render("page.html", sections=sections, **frame))


def write_page(path: str | Path, title: str, sections: Sequence[tuple[str, str]], style: str = "") -> Path:
    """Write a page whose charts may hatch, atomically, and return its path."""
    atomic_write(Path(path), utf8(page(title, sections, Markup(style), patterns=True)))
    return Path(path)


def is_page(path: Path) -> bool:
    """Whether a file is a page that was written here."""
    with path.open("rb") as file:
        return _GENERATOR.encode() in file.read(1000)


def table(caption: str, header: Sequence[str], rows: Sequence[Sequence[object]], text_columns: int = 1) -> Markup:
    """A table whose first columns are text and whose other columns are numbers."""
    return render("table.html", caption=caption, header=header, rows=rows, text_columns=text_columns)


def preformatted(text: str) -> Markup:
    """Text as it is."""
    return Markup("<pre>{}</pre>").format(text)


def folded(summary: str, values: Mapping[str, Any]) -> Markup:
    """Settings as JSON, numbers rounded to four digits, behind a line that opens them."""
    text = json.dumps(_rounded(values), indent=1, default=str)
    return Markup("<details><summary>{}</summary><pre>{}</pre></details>\n").format(summary, text)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): _rounded(inner) for key, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def paragraph(text: str) -> Markup:
    return Markup("<p>{}</p>\n").format(text)
