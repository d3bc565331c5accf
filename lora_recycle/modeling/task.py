"""A fitted task: the class centres of a support set, with the user's own label names."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from ..prototypes import class_sums
from ..storage import atomic_save_tensors
from .heads import ClassCentreHead
from .sidecar import read_task


@dataclasses.dataclass(frozen=True)
class FewShotTask:
    """What `fit` learns. It never changes: more images make a new one.

    Args:
        label_names: C labels, as the user gave them.
        sums: (C, D), the sum of each class's embeddings, so that images can be added later.
        counts: (C,), their number.
        prepared: (C, D), the centres as the head compares with them.
    """

    label_names: list[Any]
    sums: torch.Tensor
    counts: torch.Tensor
    prepared: torch.Tensor

    @classmethod
    def fitted(
        cls, features: torch.Tensor, labels: list[Any], head: ClassCentreHead, earlier: FewShotTask | None = None
    ) -> FewShotTask:
        """Embeddings (N, D) and their N labels, added to those of an `earlier` task."""
        known = earlier.label_names if earlier else []
        names = known + sorted(set(labels) - set(known), key=lambda label: (str(type(label)), label))
        column = {name: i for i, name in enumerate(names)}
        index = torch.tensor([column[label] for label in labels], device=features.device)
        sums, counts = class_sums(features, index, len(names))
        if earlier:
            sums[: len(known)] += earlier.sums.to(sums)
            counts[: len(known)] += earlier.counts.to(counts)
        return cls(names, sums, counts, head.prepare(sums / counts[:, None]))

    @property
    def centres(self) -> torch.Tensor:
        """(C, D)."""
        return self.sums / self.counts[:, None]

    def logits(self, features: torch.Tensor, head: ClassCentreHead) -> torch.Tensor:
        """(Q, D) to (Q, C), float32."""
        return head.prepared_logits(features.float(), self.prepared.to(features.device))


def save_task(path: Path, task: FewShotTask) -> None:
    """Write a task atomically."""
    tensors = {"sums": task.sums.cpu().contiguous(), "counts": task.counts.cpu().contiguous()}
    atomic_save_tensors(path, tensors, json.dumps({"label_names": task.label_names}))


def load_task(path: Path, head: ClassCentreHead, width: int) -> FewShotTask | None:
    """Read a task on features of `width` numbers; None where there is no file.

    Raises:
        AdapterError: the file is damaged.
    """
    if not path.is_file():
        return None
    names, sums, counts = read_task(path, width)
    return FewShotTask(names, sums, counts, head.prepare(sums / counts[:, None]))
