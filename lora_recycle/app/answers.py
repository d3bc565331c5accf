"""Answers as HTML: each image beside the patches that were looked at, and its probabilities as bars with numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..fewshot.domains import SHARED
from ..reports.gallery import data_uri, show_attention
from ..reports.html_page import render
from ..runtime.terminal import counted
from .session import Answer


CLASSES_SHOWN = 5

#: In Gradio's own colours, so that it is light where the page is light and dark where it is dark.
STYLE = """
.answers { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); gap: 1rem; }
.answers figure { margin: 0; padding: .8rem; border: 1px solid var(--border-color-primary); border-radius: 8px;
  background: var(--background-fill-secondary); color: var(--body-text-color); }
.answers .pictures { display: flex; gap: .4rem; }
.answers img { flex: 1; min-width: 0; width: 50%; aspect-ratio: 1; border-radius: 4px; }
.answers h3 { margin: .5rem 0 .3rem; font-size: 1.1rem; overflow-wrap: anywhere; }
.answers ol { list-style: none; margin: 0; padding: 0; }
.answers li { display: grid; grid-template-columns: 1fr auto; column-gap: .6rem; margin: .15rem 0; }
.answers li span { overflow-wrap: anywhere; } .answers li b { font-variant-numeric: tabular-nums; }
.answers .bar { grid-column: 1 / -1; height: .45rem; border: 1px solid var(--body-text-color); border-radius: 3px; }
.answers .bar i { display: block; height: 100%; background: var(--body-text-color); }
.answers p { margin: .5rem 0 0; font-size: .85rem; opacity: .85; }
.answers .unsure { border-style: dashed; border-width: 2px; }
.answers .unsure p.doubt { opacity: 1; font-weight: 600; }
"""


def answers_html(answers: Sequence[Answer], patch_size: int, skipped: Sequence[str] = ()) -> str:
    """All answers, in the order of the images, after those images that could not be read, and why."""
    domain = answers[0].domain if answers else None
    where = "no domain of the adapters: the shared network answers" if domain == SHARED else f"domain {domain}"
    shown = [_shown(answer, patch_size) for answer in answers]
    left_out = f"{counted(len(skipped), 'image')} left out:" if skipped else None
    return str(
        render("answers.html", where=where if domain else None, answers=shown, left_out=left_out, skipped=skipped)
    )


def _shown(answer: Answer, patch_size: int) -> dict[str, Any]:
    bars = [(name, f"{value:.1%}", f"{100 * value:.1f}") for name, value in answer.probabilities.items()]
    return {
        "image": data_uri(answer.pixels),
        "lit": data_uri(show_attention(answer.pixels, answer.attention, patch_size)),
        "best": next(iter(answer.probabilities)),
        "bars": bars[:CLASSES_SHOWN],
        "more": f"and {counted(len(bars) - CLASSES_SHOWN, 'less likely class', 'less likely classes')}",
        "hidden": len(bars) - CLASSES_SHOWN,
        "doubt": f"Unsure: {bars[0][1]} against {bars[1][1]} for {bars[1][0]}." if answer.unsure else None,
        "looked_at": _looked_at(answer.attention),
    }


def _looked_at(attention: torch.Tensor) -> str:
    """How concentrated the attention is, in words."""
    sums = attention.sort(descending=True).values.cumsum(0)
    half = min(int((sums < 0.5).sum()) + 1, len(attention))
    return f"Half of the attention lies on {half} of {counted(len(attention), 'patch', 'patches')} (bright)."
