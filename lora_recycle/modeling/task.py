"""A fitted task: what a head keeps of a support set, with the user's own label names."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import AdapterError
from ..fewshot.domains import SHARED, DomainChoice
from ..fewshot.heads import HEADS, FewShotHead
from ..hub.repo_files import MAX_CLASSES
from ..runtime.files import atomic_save_tensors, read_header
from ..runtime.untrusted import parse_json
from ..runtime.untrusted_tensors import read_safetensors_header
from .support import check_labels


#: Most scores (images x classes) that fitting a head to the embeddings of a file may take at a time: 256 MB.
_MAX_SCORES = 2**26


@dataclasses.dataclass(frozen=True)
class FewShotTask:
    """What `fit` learns. It never changes: more images make a new one.

    Args:
        label_names: C labels, as the user gave them.
        statistics: what the head keeps of the support set, so that images can be added later.
        prepared: what the head scores queries with.
        domain: whose network saw the images; None of a model without experts, which has one network.
    """

    label_names: list[Any]
    statistics: dict[str, torch.Tensor]
    prepared: dict[str, torch.Tensor]
    domain: DomainChoice | None = None

    @property
    def network(self) -> str:
        """Name of the network whose embeddings it takes."""
        return SHARED if self.domain is None else self.domain.name

    @classmethod
    def fitted(
        cls,
        features: torch.Tensor,
        labels: list[Any],
        head: FewShotHead,
        earlier: FewShotTask | None = None,
        domain: DomainChoice | None = None,
    ) -> FewShotTask:
        """Embeddings (N, D) by the network of `domain` and their N labels, added to those of an `earlier` task, which
        keeps its domain."""
        known = earlier.label_names if earlier else []
        check_labels([*known, *labels])
        names = known + sorted(set(labels) - set(known), key=lambda label: (str(type(label)), label))
        column = {name: i for i, name in enumerate(names)}
        index = torch.tensor([column[label] for label in labels], device=features.device)
        statistics = head.statistics(features, index, len(names))
        if earlier:
            statistics = head.merged(earlier.statistics, statistics)
        return cls(names, statistics, head.prepare(statistics), earlier.domain if earlier else domain)

    def logits(self, features: torch.Tensor, head: FewShotHead) -> torch.Tensor:
        """(Q, D) to (Q, C), float32."""
        prepared = {name: value.to(features.device) for name, value in self.prepared.items()}
        return head.logits(features.float(), prepared)


def save_task(path: Path, task: FewShotTask) -> None:
    """Write a task atomically."""
    tensors = {name: value.cpu().contiguous() for name, value in task.statistics.items()}
    header: dict[str, Any] = {"label_names": task.label_names}
    if task.domain is not None:
        header["domain"] = dataclasses.asdict(task.domain)
    atomic_save_tensors(path, tensors, json.dumps(header))


def holds_task(path: Path) -> bool:
    """Whether a file is one that `save_task` wrote."""
    try:
        return "label_names" in read_header(path)
    except (OSError, ValueError):
        return False


def load_task(path: Path, head: FewShotHead, width: int, domains: Sequence[str] = ()) -> FewShotTask | None:
    """Read a task on embeddings of `width` numbers from a file that is not trusted.

    Args:
        domains: of the model, see [`MetaLoRAForFewShotClassification.domains`].

    Returns:
        None where there is no file, or, with a warning, where another kind of head fitted it.

    Raises:
        AdapterError: the file is damaged, does not hold plain names and such statistics as the head keeps, or is of a
            domain that the model has not.
    """
    if not path.is_file():
        return None
    try:
        shapes = read_safetensors_header(path).bounded_shapes()
        if _is_of_another_head(shapes, head):
            warnings.warn(
                f"{path}: the fitted task holds {', '.join(sorted(shapes))}, but the head {head.name} needs "
                f"{', '.join(sorted(head.statistics_shapes))}. Call fit again, or load it with the head it had."
            )
            return None
        with safe_open(path, "pt") as file:
            header = parse_json((file.metadata() or {})["header"])
            names, domain = header["label_names"], _domain(header.get("domain"), domains)
            _check_names(names)
            _check_shapes(shapes, head, len(names), width)
            statistics = {name: file.get_tensor(name) for name in shapes}
        _check_values(statistics, len(names))
        prepared = head.prepare(statistics)
        _check_finite(prepared)  # finite numbers may be too large
        return FewShotTask(names, statistics, prepared, domain)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise AdapterError(f"{path}: the fitted task cannot be read ({error!r}). Delete the file.") from error


def _domain(found: Any, domains: Sequence[str]) -> DomainChoice | None:
    """Raises `KeyError`, `TypeError` or `ValueError` where it is no choice of one of `domains`."""
    if found is None:
        return None
    name, scores = found["name"], found["scores"]
    if not isinstance(scores, dict):
        raise ValueError("the scores of its domains are no object")
    if name not in domains:
        raise ValueError(f"it is of the domain {str(name)[:80]!r}; this meta-LoRA has {', '.join(domains) or 'none'}")
    numbers = [value for row in scores.values() for value in (row["separability"], row["displacement"])]
    if not set(scores) <= set(domains) or not all(isinstance(v, float) and math.isfinite(v) for v in numbers):
        raise ValueError("the scores of its domains are no numbers")
    kept = ("separability", "displacement")
    return DomainChoice(name, {expert: {key: row[key] for key in kept} for expert, row in scores.items()})


def _is_of_another_head(shapes: dict[str, tuple[int, ...]], head: FewShotHead) -> bool:
    """Raises `ValueError` where no head keeps statistics of these names."""
    if set(shapes) not in [set(known.statistics_shapes) for known in HEADS.values()]:
        raise ValueError(f"no head keeps {', '.join(name[:80] for name in sorted(shapes)[:9])} and nothing else")
    return set(shapes) != set(head.statistics_shapes)


def _check_names(names: Any) -> None:
    plain = isinstance(names, list) and all(isinstance(name, (str, int, float)) for name in names)
    if not plain or not 1 <= len(names) <= MAX_CLASSES or len(set(names)) < len(names):
        raise ValueError(f"no list of 1 to {MAX_CLASSES} different labels")
    check_labels(names)


def _check_shapes(shapes: dict[str, tuple[int, ...]], head: FewShotHead, classes: int, width: int) -> None:
    """Raises `ValueError` where tensors do not have the shapes that the head's letters say."""
    sizes = {"C": classes, "D": width}
    for name, letters in head.statistics_shapes.items():
        expected = tuple(sizes.setdefault(letter, size) for letter, size in zip(letters, shapes[name], strict=False))
        if len(letters) != len(shapes[name]) or expected != shapes[name]:
            raise ValueError(f"{classes} labels on {width} features, but {name} has the shape {shapes[name]}")
    if sizes.get("N", 0) * classes > _MAX_SCORES:
        raise ValueError(f"{sizes['N']} images and {classes} labels, too many to fit {head.name} to")


def _check_values(statistics: dict[str, torch.Tensor], classes: int) -> None:
    """Raises `ValueError` where numbers cannot be those of a support set."""
    for name, value in statistics.items():
        if value.dtype != (torch.int64 if name == "labels" else torch.float32):
            raise ValueError(f"{name} holds numbers of the type {value.dtype}")
    _check_finite(statistics)
    if "counts" in statistics and not (statistics["counts"] >= 1).all():
        raise ValueError("counts are less than 1")
    if "labels" in statistics and statistics["labels"].unique().tolist() != list(range(classes)):
        raise ValueError(f"labels do not number the {classes} classes")
    if "features" in statistics and (statistics["features"].norm(dim=-1) > 1.01).any():
        raise ValueError("features are longer than 1")  # a fit to them might not end well


def _check_finite(tensors: dict[str, torch.Tensor]) -> None:
    for name, value in tensors.items():
        if not value.isfinite().all():
            raise ValueError(f"{name} is not finite")
