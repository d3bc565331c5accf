"""Real images from wherever a user keeps them, decoded and resized into one tensor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..errors import DataError
from .decode import decoded
from .sources import ImageSource, open_source


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
) -> LabelledImages:
    """Read labelled images, convert to RGB and resize to `size` x `size`.

    Args:
        path (`str` or `Path`): a parquet file, a `datasets.save_to_disk` folder, a folder of class folders or a
            Hub data set id.
        resample (`int`, *optional*, defaults to 3): PIL's number of the filter, as image processors give it.
        max_per_class (`int`, *optional*): keep a random subset of each class, drawn before any image is decoded.
        split (`str`, *optional*): which split of a folder or Hub data set; by default test, validation or train.

    Raises:
        DataError: nothing there, no image or label column, an empty class folder, or an image that cannot be read.
    """
    source = open_source(path, split)
    labels, label_names = source.classes()
    kept = _subset(labels, max_per_class, seed)
    names = [str(name) for name in label_names]
    return LabelledImages(_decode(source, kept, size, resample), labels[kept], names, source.name)


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


def _decode(source: ImageSource, kept: torch.Tensor, size: int, resample: int) -> torch.Tensor:
    """uint8 (len(kept), 3, size, size) images of a source."""
    pixels = torch.empty(len(kept), 3, size, size, dtype=torch.uint8)
    target = pixels.numpy()

    def resized(image: Image.Image) -> np.ndarray:
        return np.asarray(image if image.size == (size, size) else image.resize((size, size), resample))

    for number, picture in enumerate(decoded(source.fetch(kept.tolist()), resized)):
        if isinstance(picture, DataError):
            raise picture
        target[number] = picture.transpose(2, 0, 1)
    return pixels


def _subset(labels: torch.Tensor, max_per_class: int | None, seed: int) -> torch.Tensor:
    """(M,) sorted indices with at most `max_per_class` of each label."""
    if max_per_class is None:
        return torch.arange(len(labels))
    generator = torch.Generator().manual_seed(seed)
    classes = [(labels == label).nonzero().flatten() for label in labels.unique()]
    kept = [members[torch.randperm(len(members), generator=generator)[:max_per_class]] for members in classes]
    return torch.cat(kept).sort().values
