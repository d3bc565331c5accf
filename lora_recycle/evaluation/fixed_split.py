"""How good one classifier is: a fitted task on labelled images that it has not seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from scipy.stats import beta

from ..images.sources import ImageSource
from ..modeling.classifier import FewShotClassifier
from ..modeling.support import check_known_labels, labelled_images
from .rejection import expected_calibration_error


WORST_SHOWN = 20


@dataclasses.dataclass
class SplitResult:
    """A fitted task on N test images of C classes.

    Args:
        label_names: C labels, in the order of the task.
        labels: int64 (N,), the right classes.
        probabilities: float32 (N, C).
        names: what each image is called.
    """

    label_names: list[Any]
    labels: torch.Tensor
    probabilities: torch.Tensor
    names: list[str]

    @property
    def predicted(self) -> torch.Tensor:
        """int64 (N,)."""
        return self.probabilities.argmax(1)

    @property
    def accuracy(self) -> float:
        """Per cent."""
        return 100.0 * (self.predicted == self.labels).double().mean().item()

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval of the accuracy, per cent: exact for a binomial (Clopper and Pearson, 1934)."""
        return exact_interval(int((self.predicted == self.labels).sum()), len(self.labels))

    @property
    def confusion(self) -> torch.Tensor:
        """int64 (C, C): images of each class (row) by the class that they were taken for (column)."""
        classes = len(self.label_names)
        return torch.bincount(self.labels * classes + self.predicted, minlength=classes**2).view(classes, classes)

    @property
    def calibration_error(self) -> float:
        """Expected calibration error in per cent, see [`expected_calibration_error`]."""
        return expected_calibration_error(self.probabilities.amax(1), self.predicted == self.labels)

    def per_class(self) -> list[dict[str, Any]]:
        """For each class: number of images, recall with its interval, and precision (None where nothing was taken for
        it), in per cent. A class without test images has no recall."""
        confusion, rows = self.confusion, []
        for number, name in enumerate(self.label_names):
            right, images = int(confusion[number, number]), int(confusion[number].sum())
            taken = int(confusion[:, number].sum())
            row: dict[str, Any] = {"class": name, "images": images}
            row["recall"] = 100.0 * right / images if images else None
            row["ci95"] = list(exact_interval(right, images)) if images else None
            row["precision"] = 100.0 * right / taken if taken else None
            rows.append(row)
        return rows

    def worst(self, most: int = WORST_SHOWN) -> list[dict[str, Any]]:
        """The wrong answers, the surest first."""
        sure, predicted = self.probabilities.max(1)
        wrong = (predicted != self.labels).nonzero().flatten()
        order = wrong[sure[wrong].argsort(descending=True, stable=True)][:most].tolist()
        return [
            {
                "file": self.names[row],
                "label": self.label_names[int(self.labels[row])],
                "predicted": self.label_names[int(predicted[row])],
                "probability": sure[row].item(),
            }
            for row in order
        ]

    def to_dict(self) -> dict[str, Any]:
        """All of it, as JSON takes it."""
        return {
            "images": len(self.labels),
            "accuracy": self.accuracy,
            "ci95": list(self.interval),
            "interval": "exact binomial (Clopper-Pearson)",
            "calibration_error": self.calibration_error,
            "classes": self.per_class(),
            "confusion": {"labels": self.label_names, "counts": self.confusion.tolist()},
            "worst": self.worst(),
        }


def evaluate_split(
    model: FewShotClassifier,
    images: Any,
    labels: Sequence[Any] | None = None,
    *,
    batch_size: int = 64,
    progress: bool = False,
) -> SplitResult:
    """A fitted model on labelled images, such as those of a test split.

    Args:
        images: with `labels`, images in any form that `fit` takes; without, what has labels; of a data set in splits
            the test split.
        labels: one for each image, as they were given to `fit`.

    Raises:
        DataError: the model is not fitted, an image cannot be read, or a label that `fit` has not seen.
    """
    known = model.label_names
    images, names = labelled_images(images, labels)
    if known:  # otherwise predict_proba says what is missing
        check_known_labels(names, known)
    probabilities = model.predict_proba(images, batch_size=batch_size, progress=progress)
    column = {name: number for number, name in enumerate(known)}
    right = torch.tensor([column[name] for name in names])
    return SplitResult(known, right, probabilities, _file_names(images))


def exact_interval(right: int, count: int) -> tuple[float, float]:
    """95% interval of a share, per cent, exact for a binomial (Clopper and Pearson, 1934)."""
    low = beta.ppf(0.025, right, count - right + 1) if right else 0.0
    high = beta.ppf(0.975, right + 1, count - right) if right < count else 1.0
    return 100.0 * float(low), 100.0 * float(high)


def _file_names(images: Any) -> list[str]:
    if isinstance(images, ImageSource):
        return [name for name, _ in images.fetch(list(range(len(images))))]
    return [
        str(image) if isinstance(image, str) or hasattr(image, "__fspath__") else f"image {number}"
        for number, image in enumerate(images)
    ]
