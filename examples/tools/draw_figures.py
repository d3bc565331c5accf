"""Draw the two figures of docs/concepts.md: the way from adapters to a meta-LoRA, and which tokens go along it.

    python examples/tools/draw_figures.py

Writes `docs/figures/overview.svg` and `docs/figures/tokens.svg`. Shape, pattern and words carry what is meant, never
colour alone. A figure brings its own background, light or dark as the reader's system is.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr


FOLDER = Path(__file__).parents[2] / "docs" / "figures"
STYLE = """
.page{fill:#fff}.box{fill:#f2f5f8;stroke:#3d4a57;stroke-width:1.5}.gone{fill:none;stroke:#6b7783;stroke-dasharray:5 4}
.kept{fill:#0b63b5;stroke:#0b63b5}.left{fill:none;stroke:#6b7783}.ink{stroke:#1d2329;stroke-width:1.5;fill:none}
.head{fill:#1d2329}text{font:13px system-ui,sans-serif;fill:#1d2329}.strong{font-weight:600}.small{font-size:12px}
@media (prefers-color-scheme:dark){.page{fill:#171b20}.box{fill:#232a31;stroke:#aeb9c4}.gone,.left{stroke:#8b97a3}
.kept{fill:#6db3f2;stroke:#6db3f2}.ink{stroke:#e6ebf0}.head,text{fill:#e6ebf0}}
"""
#: What tells the images of three adapters apart without colour: drawn in a tile of 24 pixels.
PATTERNS = (
    "M0 6h24M0 12h24M0 18h24",
    "M0 24L24 0M0 12L12 0M12 24L24 12",
    "M6 6h.1M12 6h.1M18 6h.1M6 12h.1M12 12h.1M18 12h.1M6 18h.1M12 18h.1M18 18h.1",
)
#: Which of 6 x 6 patches CLS pays most attention to, in the example of the second figure.
KEPT = {8, 9, 13, 14, 15, 16, 20, 21, 27}


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "middle") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" class="{kind}">{escape(words)}</text>'


def lines(x: float, y: float, words: Iterable[str], kind: str = "small") -> str:
    """Centred lines of text, one below the other."""
    return "".join(text(x, y + 17 * i, line, kind) for i, line in enumerate(words))


def box(x: float, y: float, width: float, height: float, kind: str = "box") -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="8" class="{kind}"/>'


def arrow(x: float, y: float, dx: float, dy: float = 0) -> str:
    return f'<path d="M{x:g} {y:g}l{dx:g} {dy:g}" class="ink" marker-end="url(#tip)"/>'


def tile(x: float, y: float, pattern: str) -> str:
    """One image, 24 pixels wide."""
    frame = f'<g transform="translate({x:g} {y:g})"><rect width="24" height="24" class="left"/>'
    return f'{frame}<path d="{pattern}" class="ink" stroke-linecap="round"/></g>'


def patches(x: float, y: float, kept: Iterable[int], side: int = 6, size: float = 14) -> str:
    """A grid of patches: filled ones go on, hollow ones do not."""
    kept = set(kept)
    return "".join(
        f'<rect x="{x + size * (i % side):g}" y="{y + size * (i // side):g}" width="{size - 3:g}" '
        f'height="{size - 3:g}" class="{"kept" if i in kept else "left"}"/>'
        for i in range(side * side)
    )


def row(x: float, y: float, kept: int, dropped: int = 0) -> str:
    """A row of tokens, CLS first."""
    cls = f'<circle cx="{x + 7:g}" cy="{y + 7:g}" r="7" class="kept"/>'
    tokens = [
        f'<rect x="{x + 19 + 13 * i:g}" y="{y + 2:g}" width="10" height="10" '
        f'class="{"kept" if i < kept else "left"}"/>'
        for i in range(kept + dropped)
    ]
    return cls + "".join(tokens)


def page(width: int, height: int, title: str, described: str, parts: Iterable[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f"aria-label={quoteattr(described)}><title>{escape(title)}</title><style>{STYLE}</style>"
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0L8 4L0 8z" class="head"/></marker></defs>'
        f'<rect width="{width}" height="{height}" rx="10" class="page"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def overview() -> str:
    """Adapters, surrogate images, episodes, one meta-LoRA, a new task."""
    parts = [text(110, 32, "1 Pool", "strong"), text(355, 32, "2 Inversion", "strong")]
    parts += [text(600, 32, "3 Distillation", "strong"), text(850, 32, "4 Use", "strong")]
    for i, (name, pattern) in enumerate(zip("ABC", PATTERNS, strict=True)):
        y = 55 + 92 * i
        parts += [box(25, y, 170, 70), text(110, y + 30, f"adapter {name} and its head")]
        parts += [text(110, y + 52, "its images are gone", "small"), arrow(200, y + 35, 62)]
        parts += [tile(275 + 32 * j, y + 23, pattern) for j in range(5)]
        parts += [box(268, y, 174, 70, "gone"), f'<path d="M447 {y + 35}h24" class="ink"/>', arrow(471, y + 35, 31)]
    parts.append('<path d="M471 90V274" class="ink"/>')
    parts.append(lines(355, 344, ["start from shapes or noise; optimise the", "pixels until adapter and head agree"]))
    for y, top, words in (
        (55, "relational batches", ["similarities as the", "adapters see them"]),
        (147, "episodes of one adapter", ["KL to its own head"]),
        (239, "episodes across adapters", ["cross-entropy on", "interpolated tasks"]),
    ):
        parts += [box(508, y, 184, 70), text(600, y + 21, top), lines(600, y + 41, words)]
    parts.append(lines(600, 344, ["the ViT stays frozen;", "one LoRA learns, from the average on"]))
    parts += [arrow(697, 90, 62, 45), arrow(697, 182, 62), arrow(697, 274, 62, -45)]
    parts += [box(765, 110, 170, 144), text(850, 138, "frozen ViT"), box(785, 154, 130, 36, "gone")]
    parts += [
        text(850, 177, "meta-LoRA", "strong"),
        lines(850, 213, ["support and query images", "in one forward pass"]),
    ]
    parts.append(lines(850, 344, ["a new task:", "labels at once, no tuning"]))
    described = (
        "Adapters with their heads are inverted into surrogate images, one set each; batches and episodes of these "
        "images teach one meta-LoRA, with which a frozen ViT classifies new tasks in a single forward pass."
    )
    return page(960, 385, "From adapters to one meta-LoRA", described, parts)


def tokens() -> str:
    """Where patches are dropped in inversion, and what meta-training reads of an image."""
    parts = [text(190, 32, "Inversion: patches are dropped on the way", "strong")]
    parts += [text(575, 32, "The mask is kept", "strong"), text(815, 32, "Meta-training", "strong")]
    for x, words, kept in (
        (30, ["the image,", "all patches"], range(36)),
        (160, ["attention of CLS", "in layer l"], KEPT),
    ):
        parts += [patches(x, 70, kept), lines(x + 40, 180, words)]
    parts += [arrow(122, 110, 30), arrow(252, 110, 30)]
    parts += [row(290, 85, 9), row(290, 121, 9), lines(358, 180, ["later layers: CLS and", "the patches kept"])]
    parts += [arrow(430, 92, 25), arrow(455, 128, -25)]
    parts += [text(475, 80, "forward", "small"), text(475, 150, "backward", "small")]
    parts += [patches(535, 70, KEPT), lines(575, 180, ["stored beside the image,", "taken on its final pixels"])]
    parts += [arrow(630, 110, 70), row(712, 88, 9, 6), lines(815, 128, ["only kept patches are embedded"])]
    parts.append(lines(815, 180, ["a quarter of the patches:", "about a quarter of the work"]))
    parts += ['<path d="M25 225H935" class="left"/>', text(30, 257, "filled: goes on", "small", "start")]
    parts += [
        patches(130, 246, [0], 1),
        text(175, 257, "hollow: left out", "small", "start"),
        patches(285, 246, [], 1),
    ]
    parts.append(text(935, 257, "At use, on real images, every patch is read.", "", "end"))
    described = (
        "In inversion the patches that get little attention from the CLS token are dropped after a layer, forward and "
        "backward. The positions that stay are stored as the image's mask, and meta-training embeds only those."
    )
    return page(960, 280, "Double efficiency: fewer tokens in both stages", described, parts)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of the figures (default: docs/figures)")
    folder = parser.parse_args(arguments).output
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in (("overview", overview), ("tokens", tokens)):
        (folder / f"{name}.svg").write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
