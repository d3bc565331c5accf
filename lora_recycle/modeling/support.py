"""Support sets in the forms that users have them, to images and one label for each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import DataError
from ..images.decode import local_path
from ..images.sources import SPLITS, ImageSource, dataset_source, is_dataset, open_source
from .preprocessing import as_batch


#: Of a folder or data set in splits, examples are taken from the one that is for learning.
LEARNING_FIRST = ("train", "validation", "valid", "val", "test")


def support_set(images: Any, labels: Sequence[Any] | None) -> tuple[Any, list[Any]]:
    """Images as [`preprocessing.as_batch`] gives them, and their labels as plain Python values.

    Args:
        images: with `labels` images in any form; without, a folder of class folders, a parquet file, a saved or a
            loaded data set, or a Hub data set id.

    Raises:
        DataError: another number of labels, labels that are no names or numbers, or none and none to be found.
    """
    return labelled_images(images, labels, LEARNING_FIRST)


def labelled_images(images: Any, labels: Sequence[Any] | None, order: Sequence[str] = SPLITS) -> tuple[Any, list[Any]]:
    """As `support_set`, of images that are there to be judged: of several splits, the first of `order`."""
    if labels is None:
        source = _labelled_source(images, order)
        numbers, label_names = source.classes()
        return source, [label_names[number] for number in numbers.tolist()]
    batch, names = as_batch(images), as_labels(labels)
    if len(batch) and len(batch) != len(names):
        raise DataError(f"{len(batch)} images, but {len(names)} labels: each image needs one.")
    return batch, names


def require_two_classes(labels: Sequence[Any]) -> None:
    """Raise `DataError` where there is one class only."""
    if len(set(labels)) < 2:
        raise DataError("A support set needs at least two classes, or there is nothing to tell apart.")


def class_numbers(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Labels of support images as int64 (S,). Raises `DataError` unless there is one for each image, and they number
    two or more classes from 0 on, each present."""
    labels = torch.as_tensor(labels)
    if len(labels) != len(images) or not len(labels):
        raise DataError(f"{len(images)} support images, but {len(labels)} labels.")
    present = labels.unique()
    require_two_classes(present.tolist())
    if not torch.equal(present.cpu(), torch.arange(len(present))):
        raise DataError(f"Support labels must number the classes 0 to {len(present) - 1}, got {present.tolist()}.")
    return labels.long()


def _labelled_source(images: Any, order: Sequence[str]) -> ImageSource:
    if is_dataset(images):
        return dataset_source(images, labelled=True, order=order)
    if not isinstance(images, (str, Path)):
        raise DataError(
            "Labels are missing: pass one for each image, or a folder with one folder of images for each class."
        )
    return open_source(local_path(images) if "://" in str(images) else images, order=order)


def as_labels(labels: Sequence[Any]) -> list[Any]:
    """Labels as plain Python values, so that equal ones are equal and JSON can hold them.

    Raises:
        DataError: something else than names and numbers, or two that would pass for one class.
    """
    plain = [label.item() if hasattr(label, "item") else label for label in labels]
    for label in plain:
        if not isinstance(label, (str, int, float)) or label != label:
            raise DataError(f"Labels must be names or numbers, got {label!r}.")
    check_labels(plain)
    return plain


def check_labels(labels: Iterable[Any]) -> None:
    """Raise `DataError` where two labels would pass for one: `1` and `"1"` read the same, `1` and `True` are equal."""
    kinds = {(type(label), label) for label in labels}
    by_text: dict[str, tuple[type, Any]] = {}
    by_value: dict[Any, tuple[type, Any]] = {}
    for kind, label in kinds:
        for known in (by_text.setdefault(str(label), (kind, label)), by_value.setdefault(label, (kind, label))):
            if known != (kind, label):
                one, other = sorted((repr(known[1]), repr(label)))
                raise DataError(f"The labels {one} and {other} would pass for one class. Give all labels one type.")


def check_known_labels(labels: Sequence[Any], known: Sequence[Any]) -> None:
    """Raise `DataError` where there are no labels, or one that is none of the `known`."""
    if not labels:
        raise DataError("There are no images to judge.")
    kinds = {(type(label), label) for label in known}
    strange = dict.fromkeys(repr(label) for label in labels if (type(label), label) not in kinds)
    if strange:
        shown, few = ", ".join(list(strange)[:5]), ", ".join(map(repr, known[:9]))
        raise DataError(
            f"The task does not know the label {shown}: it was fitted to {few}{', ...' if len(known) > 9 else ''}. "
            "Give the same names to both, or fit the class too."
        )


def without_failures(labels: list[Any], failures: dict[int, str]) -> list[Any]:
    """The labels of the images that could be read.

    Raises:
        DataError: none of the images of a class could be.
    """
    kept = [label for number, label in enumerate(labels) if number not in failures]
    present = set(kept)
    for number, reason in failures.items():
        if labels[number] not in present:
            raise DataError(f"No image of the class {labels[number]!r} can be read. The first: {reason}")
    return kept
