"""Support sets in the forms that users have them, to images and one label for each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from ..errors import DataError
from ..images.decode import local_path
from ..images.sources import SPLITS, dataset_source, open_source
from ..images.tables import (
    IMAGE_COLUMNS,
    LABEL_COLUMNS,
    NO_COLUMNS,
    Columns,
    ImageSource,
    frame_source,
    is_dataset,
    is_frame,
)
from ..runtime.terminal import counted
from .preprocessing import are_pairs, as_batch


#: Of a folder or data set in splits, examples are taken from the one that is for learning.
LEARNING_FIRST = ("train", "validation", "valid", "val", "test")


def support_set(images: Any, labels: Sequence[Any] | None, columns: Columns = NO_COLUMNS) -> tuple[Any, list[Any]]:
    """Images as [`preprocessing.as_batch`] gives them, and their labels as plain Python values.

    Args:
        images: with `labels` images in any form; without, a folder of class folders, a parquet or CSV file, a saved or
            a loaded data set, a DataFrame, a Hub data set id, pairs of image and label in a list or a torch data set,
            or a dict of the images of each class.
        columns: of a table, where they are not found by their types and usual names.

    Raises:
        DataError: another number of labels, labels that are no names or numbers, or none and none to be found.
    """
    return labelled_images(images, labels, columns, LEARNING_FIRST)


def labelled_images(
    images: Any, labels: Sequence[Any] | None, columns: Columns = NO_COLUMNS, order: Sequence[str] = SPLITS
) -> tuple[Any, list[Any]]:
    """As `support_set`, of images that are there to be judged: of several splits, the first of `order`."""
    if isinstance(labels, str):
        raise DataError(
            f"Labels must be one for each image, got the text {labels!r}. A column of a table is named as "
            f"label_column={labels!r}."
        )
    if labels is not None:
        batch, names = as_batch(images, columns), as_labels(labels)
        if len(batch) and len(batch) != len(names):
            raise DataError(
                f"{counted(len(batch), 'image')}, but {counted(len(names), 'label')}: each image needs one."
            )
        return batch, names
    if isinstance(images, Mapping) and not is_dataset(images):
        return _of_classes(images)
    if are_pairs(images) or (isinstance(images, Dataset) and hasattr(images, "__len__")):
        return _of_pairs(images)
    source = _labelled_source(images, columns, order)
    numbers, label_names = source.classes()
    return source, [label_names[number] for number in numbers.tolist()]


def _of_classes(images: Mapping[Any, Any]) -> tuple[list[Any], list[Any]]:
    """Images and labels of a dict, class by class."""
    image, label = (next((name for name in names if name in images), None) for names in (IMAGE_COLUMNS, LABEL_COLUMNS))
    if image and label:
        raise DataError(
            f"A dict holds the images of each class, by its name. Of columns pass fit(data[{image!r}], "
            f"data[{label!r}])."
        )
    batches = {name: as_batch(some) for name, some in images.items()}
    rows = {
        name: [image for _, image in batch.fetch(list(range(len(batch))))] if isinstance(batch, ImageSource) else batch
        for name, batch in batches.items()
    }
    labels = as_labels([name for name, batch in rows.items() for _ in range(len(batch))])
    return [image for batch in rows.values() for image in batch], labels


def _of_pairs(pairs: Any) -> tuple[list[Any], list[Any]]:
    """Images and labels of (image, label) pairs."""
    items = [pairs[number] for number in range(len(pairs))]
    if not are_pairs(items):
        kind = type(pairs).__name__
        raise DataError(f"The items of a {kind} without labels must be pairs of image and label. Pass labels too.")
    return [image for image, _ in items], as_labels([label for _, label in items])


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


def _labelled_source(images: Any, columns: Columns, order: Sequence[str]) -> ImageSource:
    if is_frame(images):
        return frame_source(images, labelled=True, columns=columns)
    if is_dataset(images):
        return dataset_source(images, labelled=True, order=order, columns=columns)
    if isinstance(images, (str, Path)):
        path = local_path(images) if "://" in str(images) else images
        return open_source(path, order=order, columns=columns)
    as_batch(images)  # which says what is wrong with what is no images at all
    raise DataError(
        "Labels are missing: pass one for each image, or a folder with one folder of images for each class."
    )


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
