"""Accuracies of many episodes as rows of a table: means, confidence intervals, paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..errors import DataError
from ..runtime.terminal import fit_widths, shorten, single_line


def confidence(values: torch.Tensor) -> tuple[float, float]:
    """Mean of (E,) values and half the width of its 95% confidence interval, 1.96 std / sqrt(E).

    Raises:
        DataError: fewer than two values, which have no interval.
    """
    if len(values) < 2:
        raise DataError(f"a confidence interval needs at least 2 episodes, got {len(values)}.")
    values = values.double()
    return values.mean().item(), 1.96 * values.std().item() / math.sqrt(len(values))


def summarise(accuracies: dict[str, torch.Tensor], data: str, ways: int, shots: int) -> list[dict[str, Any]]:
    """One row a method: its accuracy and its paired difference to `frozen`, each with a 95% interval, in per cent.

    Args:
        accuracies (`dict[str, torch.Tensor]`): (E,) per-episode accuracies of each method, on the same episodes.

    Raises:
        DataError: no method named `frozen`, or a method with another number of episodes.
    """
    if "frozen" not in accuracies:
        raise DataError(f"no accuracies of 'frozen' to compare with, got {', '.join(accuracies) or 'none'}.")
    frozen = accuracies["frozen"]
    rows = []
    for method, values in accuracies.items():
        if len(values) != len(frozen):
            raise DataError(f"{method} has {len(values)} episodes, frozen {len(frozen)}: they cannot be paired.")
        numbers = (*confidence(values), *confidence(values.double() - frozen.double()))
        accuracy, ci95, delta, delta_ci95 = (round(number, 3) for number in numbers)
        rows.append(
            {
                "method": method,
                "data": data,
                "ways": ways,
                "shots": shots,
                "episodes": len(values),
                "accuracy": accuracy,
                "ci95": ci95,
                "delta_vs_frozen": delta,
                "delta_ci95": delta_ci95,
            }
        )
    return rows


def format_table(rows: Sequence[dict[str, Any]], room: int | None = None) -> str:
    """Rows of `summarise` as an aligned plain-text table, an empty line between (data, ways, shots) groups.

    Args:
        room: characters in a line; long names of methods and data are shortened to fit.
    """
    lines = [["method", "data", "task", "accuracy", "vs frozen"]]
    groups: list[tuple[str, str] | None] = [None]
    for row in rows:
        delta = f"{row['delta_vs_frozen']:+.2f} ± {row['delta_ci95']:.2f}" if row["method"] != "frozen" else "-"
        task = f"{row['ways']}-way {row['shots']}-shot"
        method, data = single_line(row["method"]), single_line(row["data"])
        lines.append([method, data, task, f"{row['accuracy']:.2f} ± {row['ci95']:.2f}", delta])
        groups.append((row["data"], task))
    widths = [max(len(line[column]) for line in lines) for column in range(5)]
    widths = fit_widths(widths, (True, True, False, False, False), room, least=8) or widths
    text = []
    for number, line in enumerate(lines):
        if number > 1 and groups[number] != groups[number - 1]:
            text.append("")
        left = [shorten(cell, width).ljust(width) for cell, width in zip(line[:3], widths, strict=False)]
        right = [cell.rjust(width) for cell, width in zip(line[3:], widths[3:], strict=True)]
        text.append("  ".join(left + right))
    return "\n".join(text)
