"""Text that anyone may have written, for cards: no character of it can end a cell, a code span, a fence or a line."""

from __future__ import annotations

import re
from typing import Any

from ..runtime.terminal import printable, single_line


#: An underscore between letters or digits starts nothing, and names are full of them.
_MARKUP = re.compile(r"[\\`*\[\]<>|~$&]|(?<![^\W_])_|_(?![^\W_])")


def text(value: Any) -> str:
    """Plain text within a paragraph, a heading or a table cell; `-` for nothing."""
    line = _line(value)
    return _MARKUP.sub(r"\\\g<0>", line) if line else "-"


def code(value: Any) -> str:
    """A code span; `-` for nothing. Backticks and pipes, which nothing escapes everywhere, are shown as numbers."""
    line = _line(value).replace("`", "\\u0060").replace("|", "\\u007c")
    return f"`{line}`" if line else "-"


def block(value: str, language: str) -> str:
    """A fenced block whose fence is longer than any run of backticks in it."""
    longest = max(map(len, re.findall("`+", value)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{printable(value)}\n{fence}"


def _line(value: Any) -> str:
    return "" if value is None else single_line(" ".join(str(value).split()))
