"""Text that anyone may have written, made safe to print in a terminal and to open in a spreadsheet."""

from __future__ import annotations

import re
from collections.abc import Sequence


#: What a terminal may obey (C0 and C1 controls but tab and newline), lone surrogates, which cannot be encoded, and
#: line separators and marks that reorder the text around them.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
#: Where a spreadsheet takes a cell for a formula, full-width forms among them.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")


def printable(text: str) -> str:
    r"""The text with control characters escaped, as in `\u001b`. Tabs and newlines stay.

    The escape is JSON's, so that printable JSON stays the same JSON.
    """
    return _UNSAFE.sub(_escaped, text)


def single_line(text: str) -> str:
    """As `printable`, with tabs and newlines escaped too: for a name within a line or a table."""
    return printable(text).replace("\t", "\\t").replace("\n", "\\n")


def utf8(text: str) -> bytes:
    r"""A page or a card as UTF-8, which holds no lone surrogates: those are shown as escapes, as in `\udcff`."""
    return text.encode("utf-8", errors="backslashreplace")


def counted(number: int, thing: str, plural: str | None = None) -> str:
    """`1 image`, `2 images`; `2 classes` where the plural is given."""
    return f"{number} {thing if number == 1 else plural or thing + 's'}"


def shorten(text: str, width: int) -> str:
    """The text in so many characters, its middle left out: of a path both the folder and the file stay."""
    tail = (width - 1) * 2 // 3
    return text if len(text) <= width else f"{text[: width - 1 - tail]}…{text[len(text) - tail :]}"


def fit_widths(widths: Sequence[int], shrinks: Sequence[bool], room: int | None, least: int = 12) -> list[int] | None:
    """Widths of columns that lie two apart in `room`, the widest of those that may shrink taken in first.

    None where they do not fit with `least` characters in each of these. `room` is None where there is no end.
    """
    fitted = list(widths)
    while room is not None and sum(fitted) + 2 * (len(fitted) - 1) > room:
        wide = [i for i, (width, may) in enumerate(zip(fitted, shrinks, strict=True)) if may and width > least]
        if not wide:
            return None
        fitted[max(wide, key=fitted.__getitem__)] -= 1
    return fitted


def csv_cell(text: str) -> str:
    """As `single_line`, after an apostrophe where a spreadsheet would take the cell for a formula."""
    return f"'{single_line(text)}" if text.startswith(_FORMULA) else single_line(text)


def _escaped(match: re.Match[str]) -> str:
    return f"\\u{ord(match[0]):04x}"
