"""Cards that anyone may have written, as their metadata and their text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..runtime.untrusted import MAX_CARD_BYTES, parse_front_matter
from ..runtime.untrusted_files import read_text


@dataclass(frozen=True)
class Card:
    """A model card: the `metadata` of its front matter, and the `text` below it."""

    metadata: dict[str, Any]
    text: str

    def __str__(self) -> str:
        """The card with its front matter written anew: plain YAML, which every reader takes in time."""
        header = yaml.safe_dump(self.metadata, sort_keys=False, allow_unicode=True) if self.metadata else ""
        return f"---\n{header}---\n{self.text}"


def read_card(path: Path) -> Card:
    """A card with its front matter parsed. Raises `ValueError` where it is too large, or no plain YAML."""
    lines = read_text(path, MAX_CARD_BYTES).lstrip("\ufeff \t\r\n").splitlines(keepends=True)
    if not lines or lines[0].strip() != "---":
        return Card({}, "".join(lines))
    end = next((i for i, line in enumerate(lines[1:], 1) if line.rstrip() == "---"), None)
    if end is None:
        return Card({}, "".join(lines))
    return Card(parse_front_matter("".join(lines[1:end])), "".join(lines[end + 1 :]))
