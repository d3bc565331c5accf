"""A fitted task: what a head keeps of a support set, with the user's own label names."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import AdapterError
from ..storage import atomic_save_tensors
from .heads import FewShotHead


@dataclasses.dataclass(frozen=True)
class FewShotTask:
    """What `fit` learns. It never changes: more images make a new one.

    Args:
        label_names: C labels, as the user gave them.
        statistics: what the head keeps of the support set, so that images can be added later.
        prepared: what the head scores queries with.
    """

    label_names: list[Any]
    statistics: dict[str, torch.Tensor]
    prepared: dict[str, torch.Tensor]

    @classmethod
    def fitted(
        cls, features: torch.Tensor, labels: list[Any], head: FewShotHead, earlier: FewShotTask | None = None
    ) -> FewShotTask:
        """Embeddings (N, D) and their N labels, added to those of an `earlier` task."""
        known = earlier.label_names if earlier else []
        names = known + sorted(set(labels) - set(known), key=lambda label: (str(type(label)), label))
        column = {name: i for i, name in enumerate(names)}
        index = torch.tensor([column[label] for label in labels], device=features.device)
        statistics = head.statistics(features, index, len(names))
        if earlier:
            statistics = head.merged(earlier.statistics, statistics)
        return cls(names, statistics, head.prepare(statistics))

    def logits(self, features: torch.Tensor, head: FewShotHead) -> torch.Tensor:
        """(Q, D) to (Q, C), float32."""
        prepared = {name: value.to(features.device) for name, value in self.prepared.items()}
        return head.logits(features.float(), prepared)


def save_task(path: Path, task: FewShotTask) -> None:
    """Write a task atomically."""
    tensors = {name: value.cpu().contiguous() for name, value in task.statistics.items()}
    atomic_save_tensors(path, tensors, json.dumps({"label_names": task.label_names}))


def load_task(path: Path, head: FewShotHead) -> FewShotTask | None:
    """Read a task; None where there is no file, or, with a warning, where another kind of head fitted it.

    Raises:
        AdapterError: it is damaged.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            names = json.loads(file.metadata()["header"])["label_names"]
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in list(file.keys())}
            if set(shapes) != set(head.statistics_shapes):
                warnings.warn(
                    f"{path}: the fitted task holds {', '.join(sorted(shapes))}, but the head {head.name} needs "
                    f"{', '.join(sorted(head.statistics_shapes))}. Call fit again, or load it with the head it had."
                )
                return None
            _check_shapes(shapes, head, len(names))
            statistics = {name: file.get_tensor(name) for name in shapes}
        _check_values(statistics, len(names))
        return FewShotTask(names, statistics, head.prepare(statistics))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise AdapterError(f"{path}: the fitted task cannot be read ({error!r}). Delete the file.") from error


def _check_shapes(shapes: dict[str, tuple[int, ...]], head: FewShotHead, classes: int) -> None:
    """Raises `ValueError` where tensors do not have the shapes that the head's letters say."""
    sizes = {"C": classes}
    for name, letters in head.statistics_shapes.items():
        expected = tuple(sizes.setdefault(letter, size) for letter, size in zip(letters, shapes[name], strict=False))
        if len(letters) != len(shapes[name]) or expected != shapes[name]:
            raise ValueError(f"{name} has the shape {shapes[name]} for {classes} classes")


def _check_values(statistics: dict[str, torch.Tensor], classes: int) -> None:
    """Raises `ValueError` where numbers cannot be those of a support set."""
    if not all(value.isfinite().all() for value in statistics.values()):
        raise ValueError("a value is not finite")
    labels = statistics.get("labels")
    if labels is not None and labels.unique().tolist() != list(range(classes)):
        raise ValueError(f"labels do not number the {classes} classes")
