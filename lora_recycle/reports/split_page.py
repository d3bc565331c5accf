"""The page of one classifier: accuracy, classes, confusion matrix, the mistakes it was surest of."""

from __future__ import annotations

from pathlib import Path

from markupsafe import Markup

from ..evaluation.fixed_split import SplitResult
from .html_page import paragraph, render, table, write_page


#: Beyond it cells are too small to read; the classes with the most mistakes are shown.
MAX_CLASSES_SHOWN = 30
_CELL, _LEFT, _TOP = 32, 110, 90
_STYLE = (
    ".cell { fill: var(--other); stroke: var(--line); stroke-width: .5; } .cell.right { fill: var(--best); } "
    "svg text.count { paint-order: stroke; stroke: var(--page); stroke-width: 2px; }"
)


def write_split_page(path: str | Path, result: SplitResult, title: str) -> Path:
    """Write the page atomically and return its path."""
    low, high = result.interval
    verdict = (
        f"{result.accuracy:.1f}% of {len(result.labels)} images are right; 95% interval {low:.1f} to {high:.1f} "
        f"(exact binomial). Probabilities are off by {result.calibration_error:.1f} points on average."
    )
    classes = [
        (row["class"], row["images"], _percent(row["recall"]), _range(row["ci95"]), _percent(row["precision"]))
        for row in result.per_class()
    ]
    worst = [(row["file"], row["label"], row["predicted"], f"{row['probability']:.2f}") for row in result.worst()]
    header = ("class", "images", "recall", "95% interval", "precision")
    sections = [
        ("Accuracy", paragraph(verdict)),
        ("Classes", table("Per cent. Recall: of the class's images, how many were found.", header, classes)),
        ("Confusion matrix", confusion_matrix(result)),
        (
            "Wrong answers, the surest first",
            table("", ("image", "class", "answer", "probability"), worst, text_columns=3) if worst else Markup(),
        ),
    ]
    return write_page(path, title, sections, _STYLE)


def confusion_matrix(result: SplitResult) -> Markup:
    """An SVG whose cells have their counts; of many classes those with the most mistakes."""
    counts = result.confusion
    mistakes = counts.sum(0) + counts.sum(1) - 2 * counts.diagonal()
    shown = mistakes.argsort(descending=True, stable=True)[:MAX_CLASSES_SHOWN].sort().values.tolist()
    names = [str(result.label_names[number]) for number in shown]
    short = [name if len(name) <= 14 else f"{name[:13]}…" for name in names]
    rows = []
    for i, number in enumerate(shown):
        total = max(1, int(counts[number].sum()))
        cells = [
            {
                "x": _LEFT + _CELL * j,
                "count": int(counts[number, other]),
                "share": f"{int(counts[number, other]) / total:.2f}",
                "right": i == j,
                "full": names[j],
            }
            for j, other in enumerate(shown)
        ]
        rows.append({"y": _TOP + _CELL * i, "name": short[i], "full": names[i], "cells": cells})
    columns = [{"x": _LEFT + _CELL * j, "name": name} for j, name in enumerate(short)]
    size = {"width": max(_LEFT + _CELL * len(shown) + 40, 260), "height": _TOP + _CELL * len(shown) + 4}
    note = ""
    if len(shown) < len(result.label_names):
        note = f"The {len(shown)} classes with the most mistakes, of {len(result.label_names)}."
    figure = render("confusion.html", rows=rows, columns=columns, left=_LEFT, top=_TOP, **size)
    return (paragraph(note) if note else Markup()) + figure


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _range(interval: list[float] | None) -> str:
    return "-" if interval is None else f"{interval[0]:.0f} to {interval[1]:.0f}"
