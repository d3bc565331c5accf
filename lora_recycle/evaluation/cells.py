"""Cells of a benchmark on disk: one method on one data set at one number of shots, whole or absent."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch

from ..errors import DataError
from ..images.labelled import LabelledImages
from ..runtime.files import atomic_write
from ..version import __version__
from .engine import MethodResult


_FORMAT = 1


@dataclasses.dataclass
class Cell:
    """One result and what it is on.

    Args:
        label: of its rows: the method, and the pool where that is not the data set's first.
        kind: `frozen`, `rival` (a baseline), `meta-lora` or `tuned`.
        transductive: whether it sees an episode's queries together.
        identity: all that its numbers depend on.
    """

    label: str
    method: str
    data: str
    pool: str
    ways: int
    shots: int
    kind: str
    transductive: bool
    identity: dict[str, Any]
    result: MethodResult | None = None

    def finished(self) -> MethodResult:
        """The result. Raises `DataError` where there is none yet."""
        if self.result is None:
            raise DataError(f"{self.label} on {self.data} at {self.shots} shots has not been computed yet.")
        return self.result

    @property
    def tuning_free(self) -> bool:
        return self.kind != "tuned"

    def path(self, folder: Path) -> Path:
        digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:16]
        slug = re.sub("[^a-z0-9]+", "-", f"{self.data}-{self.label}-{self.shots}".lower()).strip("-")
        return folder / f"{slug}-{digest}.json"

    def load(self, folder: Path) -> bool:
        """Take the result from its file. False where there is none that is whole and of this identity."""
        try:
            stored = json.loads(self.path(folder).read_text(encoding="utf-8"))
            accuracies = torch.tensor(stored["accuracies"], dtype=torch.float32)
            costs = float(stored["seconds_per_task"]), float(stored["peak_memory_mb"])
        except (OSError, ValueError, KeyError, TypeError):
            return False
        if stored.get("identity") != self.identity or accuracies.shape != (self.identity["episodes"],):
            return False
        self.result = MethodResult(accuracies, *costs)
        return True

    def save(self, folder: Path, result: MethodResult) -> None:
        self.result = result
        values = {"identity": self.identity, **dataclasses.asdict(result), "accuracies": result.accuracies.tolist()}
        atomic_write(self.path(folder), json.dumps(values, allow_nan=False).encode())


def identity(data_sum: str, backbone_sum: str, settings: dict[str, Any], numbers: dict[str, Any]) -> dict[str, Any]:
    """What the numbers of a cell depend on, as JSON gives it back."""
    parts = {"format": _FORMAT, "version": __version__, "data": data_sum, "backbone": backbone_sum}
    return json.loads(json.dumps({**parts, "settings": settings, **numbers}))


def data_checksum(data: LabelledImages) -> str:
    digest = hashlib.sha256(data.pixels.contiguous().numpy().data)
    digest.update(data.labels.contiguous().numpy().data)
    digest.update(json.dumps(data.label_names).encode())
    return digest.hexdigest()
