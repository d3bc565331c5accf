"""Random changes of surrogate images in meta-training, as the paper makes them: mirrored, turned over or recoloured.

Where only some patches of an image are forwarded, they move with it: a patch of the left is one of the right in the
mirror, and its position goes with it.
"""

from __future__ import annotations

import math

import torch


#: Brightness, contrast and saturation are multiplied by up to this much more or less.
REACH = 0.5
_GREY = torch.tensor([0.299, 0.587, 0.114])  # ITU-R BT.601
_YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])


def augment(
    pixels: torch.Tensor, kept: torch.Tensor | None, grid: int, draws: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Each image by one of three changes: mirrored or turned upside down, each in half of its cases, or recoloured.

    Args:
        pixels: uint8 (B, 3, H, W), or patches (B, k, 3, p, p) where `kept` says which.
        kept: int64 (B, k), numbers of the patches, row by row.
        grid: patches in a row and in a column.
        draws: from [`draw_changes`], a row for each image, which decides alone.

    Returns:
        As `pixels` and `kept`.
    """
    kind, chance = (draws[:, 0] * 3).long(), draws[:, 1] < 0.5
    for which, axis in ((0, -1), (1, -2)):
        rows = (kind == which) & chance
        pixels = torch.where(_over(rows, pixels), pixels.flip(axis), pixels)
        if kept is not None:
            down, across = kept // grid, kept % grid
            moved = down * grid + (grid - 1 - across) if axis == -1 else (grid - 1 - down) * grid + across
            kept = torch.where(rows[:, None], moved, kept)
    rows = kind == 2
    if rows.any():
        pixels = pixels.clone()
        pixels[rows] = recolour(pixels[rows], draws[rows, 2:])
    return pixels, kept


def draw_changes(count: int, generator: torch.Generator) -> torch.Tensor:
    """Numbers in [0, 1), (count, 6): the change, whether it is made, and four of the colours."""
    return torch.rand(count, 6, generator=generator)


def recolour(pixels: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Brightness, contrast, saturation and hue of uint8 (B, ..., 3, h, w), by numbers (B, 4) in [0, 1).

    The hue turns by any angle around the grey axis, in YIQ; 0.5 of all four changes nothing.
    """
    factors = _over(1 + REACH * (2 * draws[:, :3] - 1), pixels, 3)
    brightness, contrast, saturation = factors.unbind(1)
    values = pixels.float() * brightness
    mean = _grey(values).flatten(1).mean(1)
    values = _over(mean, values) + contrast * (values - _over(mean, values))
    grey = _grey(values).unsqueeze(-3)
    values = grey + saturation * (values - grey)
    angle = math.pi * (2 * draws[:, 3] - 1)
    turn = torch.eye(3).repeat(len(draws), 1, 1)
    turn[:, 1, 1] = turn[:, 2, 2] = angle.cos()
    turn[:, 1, 2], turn[:, 2, 1] = -angle.sin(), angle.sin()
    turn = torch.linalg.inv(_YIQ) @ turn @ _YIQ  # (B, 3, 3)
    values = torch.einsum("bij,b...jhw->b...ihw", turn, values)
    return values.round().clamp(0, 255).to(torch.uint8)


def _grey(values: torch.Tensor) -> torch.Tensor:
    return torch.einsum("c,...chw->...hw", _GREY, values)


def _over(values: torch.Tensor, images: torch.Tensor, columns: int = 0) -> torch.Tensor:
    """(B,) or (B, columns) with the dimensions that broadcast it over images (B, ...)."""
    shape = (len(values), *([columns] if columns else []), *[1] * (images.ndim - 1))
    return values.view(shape)
