"""Images in any form to what the backbone takes, as its image processor would, but a batch at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..backbones import Backbone
from ..errors import ConfigError, DataError
from ..images import to_picture


def as_batch(images):
    """A sequence of images; one image alone becomes a sequence of one."""
    if isinstance(images, torch.Tensor) and images.is_floating_point():
        return images.unsqueeze(0) if images.ndim == 3 else images
    single = isinstance(images, (Image.Image, str, Path)) or getattr(images, "ndim", 4) in (2, 3)
    return [images] if single else images


def to_pixel_values(images: Sequence, backbone: Backbone) -> torch.Tensor:
    """PIL images, arrays, file names, or uint8 (N, 3, H, W) to normalised float32 (N, 3, S, S) on the device.

    The same as `backbone.processor(images)` up to rounding. Processors normalise image by image in numpy, which took
    longer than everything else here; one pass over the batch, where the model computes, does the same.

    Raises:
        DataError: no images, or one that cannot be read.
    """
    if not len(images):
        raise DataError("No images were given.")
    processor, size = backbone.processor, backbone.image_size
    if not _is_standard(processor):
        pictures = [to_picture(image) for image in images]
        return processor(images=pictures, return_tensors="pt")["pixel_values"]
    sized = _only_resizes(processor, size)
    ready = isinstance(images, torch.Tensor) and images.dtype == torch.uint8 and images.shape[1:] == (3, size, size)
    if sized and ready:
        pixels = images
    else:
        pictures = [to_picture(image) for image in images]
        pixels = _resized(pictures, size, int(processor.resample)) if sized else _processed(pictures, processor)
    scale = 1 / (255 * backbone.std)
    return pixels.to(backbone.device).float().mul_(scale).sub_(backbone.mean / backbone.std)


def _is_standard(processor) -> bool:
    """Whether it ends with (image / 255 - mean) / std, as `Backbone.normalize` does."""
    known = processor.do_rescale and processor.do_normalize and not getattr(processor, "do_pad", None)
    return bool(known) and abs(processor.rescale_factor * 255 - 1) < 1e-6


def _only_resizes(processor, size: int) -> bool:
    wanted = {"height": size, "width": size}
    exact = all(getattr(processor.size, side, None) == length for side, length in wanted.items())
    return bool(processor.do_resize) and exact and not getattr(processor, "do_center_crop", None)


def _resized(pictures: list[Image.Image], size: int, resample: int) -> torch.Tensor:
    """RGB pictures to uint8 (N, 3, size, size)."""
    pixels = np.empty((len(pictures), size, size, 3), np.uint8)
    for row, picture in zip(pixels, pictures, strict=True):
        row[:] = picture if picture.size == (size, size) else picture.resize((size, size), resample)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def _processed(pictures: list[Image.Image], processor) -> torch.Tensor:
    """What the processor resizes and crops: uint8 (N, 3, S, S)."""
    return processor(images=pictures, return_tensors="pt", do_rescale=False, do_normalize=False)["pixel_values"]


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
