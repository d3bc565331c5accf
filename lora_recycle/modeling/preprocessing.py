"""Images in any form to what the backbone takes, as its image processor would, but a batch at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ..backbones.backbone import Backbone
from ..errors import ConfigError, DataError
from ..images.decode import decoded, is_file, local_path, to_uint8
from ..images.sources import TABLES, dataset_source, open_source
from ..images.tables import NO_COLUMNS, Columns, ImageSource, frame_source, is_dataset, is_frame


Item = TypeVar("Item")


class FirstOfPairs(Sequence):
    """The images of a torch data set whose items are (image, label) pairs, each read when it is asked for."""

    def __init__(self, dataset: Any):
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: Any) -> Any:
        if index >= len(self):
            raise IndexError(index)
        item = self._dataset[index]
        return item[0] if isinstance(item, (tuple, list)) else item


def as_batch(images: Any, columns: Columns = NO_COLUMNS) -> Any:
    """A sequence of images, a tensor, or the source of a folder or a table; one image becomes a sequence of one.

    Args:
        columns: of a table, where they are not found by their types and usual names.

    Raises:
        DataError: nothing that images can be taken from.
    """
    if is_frame(images):
        return frame_source(images, labelled=False, columns=columns)
    if isinstance(images, (str, Path)):
        path = local_path(images)
        return open_source(path, labelled=False, columns=columns) if _is_many(path) else [images]
    if isinstance(images, (Image.Image, bytes)) or is_file(images) or getattr(images, "ndim", 4) in (2, 3):
        return [images]
    if isinstance(images, (torch.Tensor, np.ndarray, ImageSource)):
        return images
    if is_dataset(images):
        return dataset_source(images, labelled=False, columns=columns)
    if isinstance(images, DataLoader):
        raise DataError("A DataLoader gives batches, perhaps shuffled ones. Pass its data set: loader.dataset.")
    if isinstance(images, Dataset) and hasattr(images, "__len__"):
        return FirstOfPairs(images)
    if isinstance(images, Mapping):
        raise DataError(
            "Images cannot be taken from a dict. Pass a list of them; fit also takes {class name: images of it}."
        )
    if not isinstance(images, Iterable):
        raise DataError(f"No images can be read from a {type(images).__name__}: pass PIL images, arrays or paths.")
    items = images if isinstance(images, (list, tuple)) else list(images)  # a generator, as Path.glob gives
    if are_pairs(items):
        raise DataError("These are pairs. Pass the images alone: [image for image, _ in pairs].")
    return items


def _is_many(path: Path) -> bool:
    """Whether a path leads to a folder or a table, not to one image."""
    return path.is_dir() or path.suffix.lower() in TABLES


def are_pairs(images: Any) -> bool:
    """Whether these are (image, label) pairs in a list."""
    pairs = isinstance(images, (list, tuple)) and bool(images)
    return pairs and all(isinstance(item, (list, tuple)) and len(item) == 2 for item in images)


def pixel_batches(
    images: Any, backbone: Backbone, batch_size: int, failures: dict[int, str] | None = None, progress: bool = False
) -> Iterator[torch.Tensor]:
    """Normalised images (B, 3, S, S) in batches of at most `batch_size`, on the backbone's device.

    Files are decoded by threads while the caller works on a batch, whose successor waits ready; no more than three
    batches are in memory. Tensors and arrays are pixels, never normalised values: see [`images.decode.to_uint8`].

    Args:
        images: what [`as_batch`] gives.
        failures: takes the number and the error of each image that cannot be read, which is then left out.

    Raises:
        DataError: no images, or, without `failures`, one that cannot be read.
    """
    if not len(images):
        raise DataError("No images were given.")
    pixels = _whole_batch(images, backbone)
    if pixels is not None:
        # splitting took half the time of all that surrounds the forward of one image
        for part in [pixels] if len(pixels) <= batch_size else pixels.split(batch_size):
            yield _normalised(part, backbone)
        return
    batches = _batches(images, backbone, batch_size, failures, progress)
    yield from batches if len(images) <= batch_size else one_ahead(batches)


def one_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items, each made by a thread while the caller works on the one before."""
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as executor:
        following = executor.submit(next, items, None)
        while (item := following.result()) is not None:
            following = executor.submit(next, items, None)
            yield item


def _batches(
    images: Any, backbone: Backbone, batch_size: int, failures: dict[int, str] | None, progress: bool
) -> Iterator[torch.Tensor]:
    """As `pixel_batches`, of images that must be looked at one by one."""
    rows: list[np.ndarray] = []
    bar = tqdm(_pixels(images, backbone), "images", len(images), unit="image", disable=not progress)
    for number, row in enumerate(bar):
        if not isinstance(row, DataError):
            rows.append(row)
        elif failures is None:
            raise row
        else:
            failures[number] = str(row)
        if len(rows) == batch_size:
            yield _stacked(rows, backbone)
            rows = []
    if rows:
        yield _stacked(rows, backbone)


def to_pixel_values(images: Sequence, backbone: Backbone) -> torch.Tensor:
    """PIL images, arrays, file names, or tensors (N, 3, H, W) to normalised float32 (N, 3, S, S) on the device.

    The same as `backbone.processor(images)` up to rounding. Processors normalise image by image in numpy, which took
    longer than everything else here; one pass over the batch, where the model computes, does the same.

    Raises:
        DataError: no images, or one that cannot be read.
    """
    return torch.cat(list(pixel_batches(images, backbone, max(1, len(images)))))


def _whole_batch(images: Any, backbone: Backbone) -> torch.Tensor | None:
    """A tensor that only needs normalising, as uint8; None where images must be looked at one by one."""
    size, processor = backbone.image_size, backbone.processor
    fits = isinstance(images, torch.Tensor) and images.shape[1:] == (3, size, size)
    if not fits or not _is_standard(processor) or not _only_resizes(processor, size):
        return None
    try:
        return to_uint8(images)
    except DataError:
        return None  # one by one it is seen which of them are no pixels


def _pixels(images: Any, backbone: Backbone) -> Iterator[np.ndarray | DataError]:
    """Each image as uint8 (S, S, 3), or, of a processor that does more than resize, what it makes: (3, S, S)."""
    processor, size = backbone.processor, backbone.image_size
    items: Iterator[tuple[str | None, Any]]
    if isinstance(images, ImageSource):
        items = images.fetch(list(range(len(images))))
    else:
        items = ((None if isinstance(image, (str, Path)) else f"image {i}", image) for i, image in enumerate(images))
    resized = _is_standard(processor) and _only_resizes(processor, size)
    only_uint8 = {"do_rescale": False, "do_normalize": False} if _is_standard(processor) else {}

    def convert(picture: Image.Image) -> np.ndarray:
        if resized:
            same = picture.size == (size, size)
            return np.asarray(picture if same else picture.resize((size, size), int(processor.resample)))
        return processor(images=[picture], return_tensors="np", **only_uint8)["pixel_values"][0]

    return decoded(items, convert, _at_least(processor))


def _at_least(processor: Any) -> int | None:
    """Sides that a JPEG must keep: twice what it is resized to, so that nothing of the result is lost."""
    sides = [getattr(processor.size, side, None) for side in ("height", "width", "shortest_edge", "longest_edge")]
    return 2 * max(side or 0 for side in sides) if processor.do_resize else None


def _stacked(rows: list[np.ndarray], backbone: Backbone) -> torch.Tensor:
    pixels = torch.from_numpy(np.stack(rows))
    if not _is_standard(backbone.processor):
        return pixels.to(backbone.device)
    return _normalised(pixels if pixels.shape[1] == 3 else pixels.permute(0, 3, 1, 2).contiguous(), backbone)


def _normalised(pixels: torch.Tensor, backbone: Backbone) -> torch.Tensor:
    """uint8 (B, 3, S, S) to float32 on the device."""
    scale = 1 / (255 * backbone.std)
    return pixels.to(backbone.device).float().mul_(scale).sub_(backbone.mean / backbone.std)


def _is_standard(processor: Any) -> bool:
    """Whether it ends with (image / 255 - mean) / std, as `Backbone.normalize` does."""
    known = processor.do_rescale and processor.do_normalize and not getattr(processor, "do_pad", None)
    return bool(known) and abs(processor.rescale_factor * 255 - 1) < 1e-6


def _only_resizes(processor: Any, size: int) -> bool:
    wanted = {"height": size, "width": size}
    exact = all(getattr(processor.size, side, None) == length for side, length in wanted.items())
    return bool(processor.do_resize) and exact and not getattr(processor, "do_center_crop", None)


def image_settings(backbone: Backbone) -> dict[str, Any]:
    """What the image processor does, as data: RGB, `resize`, `crop` the middle, (values / 255 - `mean`) / `std`.

    `resize` holds `height` and `width`, or `shortest_edge` (the other side in proportion, rounded down) where `crop`,
    None otherwise, is a height and a width too. `resample` is PIL's number of the filter.

    Raises:
        ConfigError: the processor does anything else.
    """
    processor, square = backbone.processor, {"height": backbone.image_size, "width": backbone.image_size}
    resize = dict(processor.size) if processor.do_resize else {}
    crop = dict(processor.crop_size) if getattr(processor, "do_center_crop", None) else None
    fits = resize == square if crop is None else crop == square and min(resize.values(), default=0) >= crop["height"]
    if not _is_standard(processor) or set(resize) not in ({"height", "width"}, {"shortest_edge"}) or not fits:
        raise ConfigError(
            f"{backbone.name}: its image processor, {type(processor).__name__}, does more than resize, crop the "
            f"middle to {backbone.image_size} pixels and normalise, which is all that export can describe."
        )
    return {
        "resize": resize,
        "resample": int(processor.resample),
        "crop": crop,
        "mean": [float(value) for value in processor.image_mean],
        "std": [float(value) for value in processor.image_std],
    }
