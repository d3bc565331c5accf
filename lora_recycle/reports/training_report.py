"""The report of a run: accuracy where it was measured, surrogate images, training curves, how to use the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from markupsafe import Markup

from ..errors import DataError
from ..hub.cards import usage_lines
from ..runtime.terminal import counted
from .charts import bars, charts, curve
from .gallery import gallery
from .html_page import folded, paragraph, table, write_page


if TYPE_CHECKING:
    from ..distillation.trainer import MetaLoRATrainer


IMAGES_SHOWN = 48
#: What the methods are of which a demo's report shows accuracies.
_METHODS = {
    "frozen": "the bare backbone",
    "frozen-centred": "the same, without the mean of the examples",
    "average": "the average of the adapters",
    "ensemble": "the mean of what all adapters say",
    "random": "an average of random LoRAs, as a control",
    "meta-lora": "what this run made",
}
_COLUMNS = ("method", "data", "task", "episodes", "accuracy", "vs frozen")


def write_report(
    path: str | Path,
    *,
    title: str,
    curves: Mapping[str, Sequence[float]],
    surrogate_images: torch.Tensor,
    surrogate_labels: Sequence[str],
    kept_tokens: torch.Tensor | None = None,
    patch_size: int,
    config: Mapping[str, Any],
    usage: str,
    rows: Sequence[Mapping[str, Any]] = (),
    judged: Mapping[str, Any] | None = None,
    verdict: str = "",
) -> Path:
    """Write the page atomically and return its path.

    Args:
        curves (`Mapping[str, Sequence[float]]`): one curve a name, one value a step.
        surrogate_images (`torch.Tensor`): uint8 (N, 3, H, W), the images to show.
        surrogate_labels (`Sequence[str]`): N class names.
        kept_tokens (`torch.Tensor`, *optional*): (N, K) patch numbers kept, row by row from 0, [CLS] not counted;
            negative numbers are padding.
        patch_size (`int`): side of a patch in pixels.
        config (`Mapping`): settings to print.
        usage (`str`): the Python lines that use the result.
        rows (`Sequence[Mapping]`, *optional*): rows of `evaluation.results.summarise`.
        judged (`Mapping`, *optional*): `judged` of the sidecar, `CheckpointSelection.to_dict`.
        verdict (`str`, *optional*): what is kept and on which evidence, in a sentence; the page begins with it.

    Raises:
        DataError: images, labels and masks do not match.
    """
    _check(surrogate_images, surrogate_labels, kept_tokens)
    note = "Made from the adapters alone."
    figures = [curve(name, values) for name, values in curves.items()] + ([_judged_curve(judged)] if judged else [])
    sections = [
        ("Result", paragraph(verdict) if verdict else ""),
        ("Accuracy on real images", _accuracy(rows)),
        ("Training curves", charts(figures)),
        ("Surrogate images", gallery(surrogate_images, surrogate_labels, kept_tokens, patch_size, note)),
        ("Use it", Markup("<pre><code>{}</code></pre>").format(usage)),
        ("Settings", folded("Settings of the run, as JSON", config)),
    ]
    return write_page(path, title, sections)


def write_training_report(
    path: str | Path,
    trainer: MetaLoRATrainer,
    settings: Mapping[str, Any],
    meta_lora: str | Path,
    *,
    rows: Sequence[Mapping[str, Any]] = (),
    curves: Mapping[str, Sequence[float]] | None = None,
) -> Path:
    """Write the report of a training run and return its path.

    Args:
        trainer: after `train`, on surrogate data.
        settings: the sidecar of what it trained.
        meta_lora: where that lies.
        rows: accuracies, as `write_report` takes them.
        curves: more curves, to come before those of the trainer.
    """
    pool, sample = trainer.pool, trainer.surrogate.sample(IMAGES_SHOWN)
    count = counted(len(pool), "adapter")
    shown = {key: value for key, value in settings.items() if key not in ("results", "sources")}
    history = {f"distillation: {name}": values for name, values in trainer.history.items()}
    return write_report(
        path,
        title=f"One meta-LoRA from {count}",
        rows=rows,
        curves={**(curves or {}), **history},
        surrogate_images=sample.pixels,
        surrogate_labels=sample.labels,
        kept_tokens=sample.kept_tokens,
        patch_size=pool.backbone.patch_size,
        config={"backbone": pool.backbone.name, "pool": count, **shown},
        usage=usage_lines(str(meta_lora)),
        judged=settings.get("judged"),
        verdict="" if trainer.selection is None else trainer.selection.verdict(),
    )


def _judged_curve(judged: Mapping[str, Any]) -> Markup:
    """The figures of the student over the steps; that of the pool's average, which is none of them, in the caption."""
    name = f"error on the classes of {judged['who']}, per cent"
    figures, steps, kept = judged["figures"], judged["steps"], judged["best_step"]
    if judged["blends"][0] == [0, 0]:
        average_kept = judged["best_blend"] == [0, 0]
        name += f" ({figures[0]:.1f} with the pool's average{', which is kept' if average_kept else ''})"
        figures, steps, kept = figures[1:], steps[1:], None if average_kept else kept
    return curve(name, figures, steps, kept)


def _check(images: torch.Tensor, labels: Sequence[str], kept: torch.Tensor | None) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise DataError(f"surrogate images must be uint8 (N, 3, H, W), got {images.dtype} {tuple(images.shape)}.")
    masks = len(images) if kept is None else len(kept)
    if not len(images) == len(labels) == masks:
        raise DataError(f"{len(images)} surrogate images, {len(labels)} labels and {masks} masks do not match.")


def _accuracy(rows: Sequence[Mapping[str, Any]]) -> Markup:
    if not rows:
        return Markup()
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["data"], row["ways"], row["shots"]), []).append(row)
    methods = [name for name in _METHODS if any(row["method"] == name for row in rows)]
    known = Markup("; ").join(Markup("<em>{}</em>: {}").format(name, _METHODS[name]) for name in methods)
    note = paragraph(
        "Hatched: the meta-LoRA. Lines on the bars: 95% intervals. Dashed: chance. Bars begin where the axis says."
    )
    note += Markup("<p>{}.</p>\n").format(known)
    caption, header = "Per cent, with 95% intervals; differences are paired.", list(_COLUMNS)
    lines = [_accuracy_row(row) for row in rows]
    if len({row["episodes"] for row in rows}) == 1:  # a column that says nothing takes width, which phones lack
        caption = f"Per cent, over {rows[0]['episodes']} episodes, with 95% intervals; differences are paired."
        header, lines = [*header[:3], *header[4:]], [(*line[:3], *line[4:]) for line in lines]
    numbers = table(caption, header, lines, text_columns=3)
    return note + charts([bars(group) for group in groups.values()]) + numbers


def _accuracy_row(row: Mapping[str, Any]) -> tuple:
    delta = "" if row["method"] == "frozen" else f"{row['delta_vs_frozen']:+.2f} ± {row['delta_ci95']:.2f}"
    task = f"{row['ways']}-way {row['shots']}-shot"
    return row["method"], row["data"], task, row["episodes"], f"{row['accuracy']:.2f} ± {row['ci95']:.2f}", delta
