"""Answers as HTML: each image beside the patches that were looked at, and its probabilities as bars with numbers."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import torch

from ..reports.gallery import data_uri, show_attention
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
"""


def answers_html(answers: Sequence[Answer], patch_size: int) -> str:
    """All answers, in the order of the images."""
    figures = [_figure(number, answer, patch_size) for number, answer in enumerate(answers, 1)]
    return f'<div class="answers">{"".join(figures)}</div>'


def _figure(number: int, answer: Answer, patch_size: int) -> str:
    best, *_ = answer.probabilities
    lit = show_attention(answer.pixels, answer.attention, patch_size)
    bars = "".join(_bar(name, value) for name, value in list(answer.probabilities.items())[:CLASSES_SHOWN])
    hidden = len(answer.probabilities) - CLASSES_SHOWN
    more = f"<p>and {hidden} less likely classes</p>" if hidden > 0 else ""
    return (
        f'<figure><div class="pictures"><img src="{data_uri(answer.pixels)}" alt="new image {number}">'
        f'<img src="{data_uri(lit)}" alt="the same, bright where the model looked"></div>'
        f"<figcaption><h3>{escape(best)}</h3><ol>{bars}</ol>{more}<p>{_looked_at(answer.attention)}</p>"
        "</figcaption></figure>"
    )


def _bar(name: str, probability: float) -> str:
    return (
        f"<li><span>{escape(name)}</span><b>{probability:.1%}</b>"
        f'<div class="bar" aria-hidden="true"><i style="width:{100 * probability:.1f}%"></i></div></li>'
    )


def _looked_at(attention: torch.Tensor) -> str:
    """How concentrated the attention is, in words."""
    sums = attention.sort(descending=True).values.cumsum(0)
    half = min(int((sums < 0.5).sum()) + 1, len(attention))
    return f"Half of the attention lies on {half} of {len(attention)} patches (bright)."
