"""Images on pages: as they are, beside the patches that a model kept, or lit by what it looked at."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import torch
from markupsafe import Markup
from PIL import Image

from .html_page import render


_DIMMED = 0.2  # brightness of the patches that were pruned or not looked at


def gallery(
    images: torch.Tensor, captions: Sequence[str], kept: torch.Tensor | None, patch_size: int | None, note: str
) -> Markup:
    """A grid of images with their captions, each beside its kept patches where known.

    Args:
        images: uint8 (N, 3, H, W).
        kept: (N, K) patch numbers, row by row from 0, [CLS] not counted; negative numbers are padding.
        patch_size: needed with `kept`.
    """
    figures = []
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        masked = None
        if kept is not None and patch_size is not None:
            masked = data_uri(show_kept(image, kept[number], patch_size))
        figures.append({"image": data_uri(image), "caption": caption, "kept": masked})
    note += "" if kept is None else " Right: patches kept."
    return render("gallery.html", note=note, figures=figures)


def show_kept(image: torch.Tensor, kept: torch.Tensor, patch_size: int) -> torch.Tensor:
    """(3, H, W) uint8 image with all but the (K,) kept patches darkened."""
    patches = (image.shape[1] // patch_size) * (image.shape[2] // patch_size)
    brightness, kept = torch.full((patches,), _DIMMED), kept.long()
    brightness[kept[(kept >= 0) & (kept < patches)]] = 1.0
    return _lit(image, brightness, patch_size)


def show_attention(image: torch.Tensor, attention: torch.Tensor, patch_size: int) -> torch.Tensor:
    """(3, H, W) uint8 image, each patch as bright as its share of the attention: (P,), the highest is fully lit."""
    share = attention.float().cpu() / attention.max().clamp_min(torch.finfo(torch.float32).tiny).cpu()
    return _lit(image, _DIMMED + (1 - _DIMMED) * share, patch_size)


def _lit(image: torch.Tensor, brightness: torch.Tensor, patch_size: int) -> torch.Tensor:
    rows, columns = image.shape[1] // patch_size, image.shape[2] // patch_size
    mask = brightness.view(rows, columns).repeat_interleave(patch_size, 0).repeat_interleave(patch_size, 1)
    full = torch.full(image.shape[1:], _DIMMED)  # a rim narrower than a patch is no token
    full[: mask.shape[0], : mask.shape[1]] = mask
    return (image * full).to(torch.uint8)


def data_uri(image: torch.Tensor) -> str:
    """(3, H, W) uint8 image as a PNG data URI."""
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy()).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
