"""Real images from wherever a user keeps them, decoded and resized into one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..errors import DataError
from .decode import decoded
from .sources import open_source
from .tables import NO_COLUMNS, Columns, ImageSource


@dataclass
class LabelledImages:
    """Images with their classes, ready for a backbone's normalisation.

    Args:
        pixels (`torch.Tensor`): uint8 (N, 3, size, size), RGB, resized, not normalised.
        labels (`torch.Tensor`): int64 (N,), indices into `label_names`.
        label_names (`list[str]`): the class names.
        name (`str`): a short name for tables.
    """

    pixels: torch.Tensor
    labels: torch.Tensor
    label_names: list[str]
    name: str

    def __repr__(self) -> str:
        return f"LabelledImages({self.name!r}, {len(self)} images of {len(self.label_names)} classes)"

    def __len__(self) -> int:
        return len(self.labels)

    def by_class(self) -> dict[int, torch.Tensor]:
        """The indices, (n,) each, of the images of every class that has any."""
        return {label: (self.labels == label).nonzero().flatten() for label in self.labels.unique().tolist()}


def load_labelled_images(
    path: str | Path,
    size: int,
    resample: int = 3,
    max_per_class: int | None = None,
    split: str | None = None,
    seed: int = 0,
    *,
    without_classes: Sequence[str] = (),
    without_images: Sequence[int] = (),
    columns: Columns = NO_COLUMNS,
    failures: dict[int, str] | None = None,
) -> LabelledImages:
    """Read labelled images, convert to RGB and resize to `size` x `size`.

    Args:
        path (`str` or `Path`): a parquet or CSV file, a `datasets.save_to_disk` folder, a folder of class folders or
            a Hub data set id.
        resample (`int`, *optional*, defaults to 3): PIL's number of the filter, as image processors give it.
        max_per_class (`int`, *optional*): keep a random subset of each class, drawn before any image is decoded.
        split (`str`, *optional*): which split of a folder or Hub data set; by default test, validation or train.
        without_classes (`Sequence[str]`, *optional*): names of classes to leave out, as those that an adapter knows.
        without_images (`Sequence[int]`, *optional*): numbers of images to leave out, counted from 0 in the order of
            the data set, as those that are also training images. Both are left out before a subset is drawn.
        columns ([`images.tables.Columns`], *optional*): of a table, where they are not found.
        failures (`dict`, *optional*): takes the number and the error of each image that cannot be read, which is left
            out; without it the first one is an error.

    Raises:
        DataError: nothing there, no image or label column, an empty class folder, a class of which no image can be
            read, or a class or an image to leave out that is not there.
        ImageError: an image that cannot be read.
    """
    source = open_source(path, split, columns=columns)
    labels, label_names = source.classes()
    names = [str(name) for name in label_names]
    wanted = _wanted(labels, names, without_classes, without_images, source.name)
    kept = wanted[_subset(labels[wanted], max_per_class, seed)]
    unread: dict[int, str] | None = None if failures is None else {}
    pixels = _decode(source, kept, size, resample, unread)
    if unread:
        read = torch.tensor([place not in unread for place in range(len(kept))])
        for label in sorted(set(labels[kept].tolist()) - set(labels[kept][read].tolist())):
            place = next(place for place in unread if labels[kept[place]] == label)
            raise DataError(f"No image of the class {names[label]!r} can be read. The first: {unread[place]}")
        assert failures is not None
        failures |= {int(kept[place]): reason for place, reason in unread.items()}
        pixels, kept = pixels[read], kept[read]
    return LabelledImages(pixels, labels[kept], names, source.name)


def load_unlabelled_images(
    path: str | Path, size: int, resample: int = 3, limit: int | None = None, seed: int = 0
) -> torch.Tensor:
    """Read images without labels, uint8 (N, 3, size, size): every image below a folder, or those of a data set.

    Args:
        limit (`int`, *optional*): keep a random subset of so many images, drawn before any is decoded.

    Raises:
        DataError: nothing there, no images, or an image that cannot be read.
    """
    source = open_source(path, labelled=False)
    kept = _subset(torch.zeros(len(source)), limit, seed)  # all of one class
    return _decode(source, kept, size, resample)


def _decode(
    source: ImageSource, kept: torch.Tensor, size: int, resample: int, failures: dict[int, str] | None = None
) -> torch.Tensor:
    """uint8 (len(kept), 3, size, size) images of a source; those that `failures` takes stay empty."""
    pixels = torch.empty(len(kept), 3, size, size, dtype=torch.uint8)
    target = pixels.numpy()

    def resized(image: Image.Image) -> np.ndarray:
        return np.asarray(image if image.size == (size, size) else image.resize((size, size), resample))

    for number, picture in enumerate(decoded(source.fetch(kept.tolist()), resized)):
        if not isinstance(picture, DataError):
            target[number] = picture.transpose(2, 0, 1)
        elif failures is None:
            raise picture
        else:
            failures[number] = str(picture)
    return pixels


def _wanted(
    labels: torch.Tensor, names: list[str], without_classes: Sequence[str], without_images: Sequence[int], place: str
) -> torch.Tensor:
    """(M,) ascending indices of the images that are not left out. Raises `DataError` as `load_labelled_images`."""
    wanted = torch.ones(len(labels), dtype=torch.bool)
    for name in without_classes:
        if name not in names:
            raise DataError(f"{place}: there is no class {name[:80]!r} to leave out.")
        wanted &= labels != names.index(name)
    for number in without_images:
        if not 0 <= number < len(labels):
            raise DataError(f"{place}: there is no image {number} to leave out; they are 0 to {len(labels) - 1}.")
        wanted[number] = False
    return wanted.nonzero().flatten()


def _subset(labels: torch.Tensor, max_per_class: int | None, seed: int) -> torch.Tensor:
    """(M,) sorted indices with at most `max_per_class` of each label."""
    if max_per_class is None:
        return torch.arange(len(labels))
    generator = torch.Generator().manual_seed(seed)
    classes = [(labels == label).nonzero().flatten() for label in labels.unique()]
    kept = [members[torch.randperm(len(members), generator=generator)[:max_per_class]] for members in classes]
    return torch.cat(kept).sort().values
