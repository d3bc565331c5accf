"""Pictures on cards."""

from __future__ import annotations

import io

import torch
from PIL import Image


def picture_grid(pixels: torch.Tensor, columns: int = 8, side: int = 96) -> bytes:
    """PNG of uint8 (N, 3, H, W) images in rows of `columns`, none larger than `side`."""
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]
    for picture in pictures:
        picture.thumbnail((side, side))
    width, height = (size + 2 for size in pictures[0].size)  # a gap of two pixels
    rows = -(-len(pictures) // columns)
    grid = Image.new("RGB", (min(len(pictures), columns) * width - 2, rows * height - 2), "white")
    for i, picture in enumerate(pictures):
        grid.paste(picture, (i % columns * width, i // columns * height))
    file = io.BytesIO()
    grid.save(file, "PNG")
    return file.getvalue()
