"""Starting images: noise, procedural pictures, or images that the user has. All are float (N, 3, S, S) in [0, 1]."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image, ImageDraw


def noise(count: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """Gaussian noise around mid-grey, the start of the paper."""
    return (0.5 + 0.25 * torch.randn(count, 3, size, size, generator=generator)).clamp_(0, 1)


def fractal(count: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """Textures with the 1/f amplitude spectrum of natural images and correlated colours."""
    f = torch.fft.fftfreq(size)
    radius = (f[:, None] ** 2 + f[None] ** 2).sqrt()
    radius[0, 0] = math.inf
    exponent = 0.8 + 0.8 * torch.rand(count, 1, 1, 1, generator=generator)
    spectrum = torch.fft.fft2(torch.randn(count, 3, size, size, generator=generator)) / radius**exponent
    texture = torch.fft.ifft2(spectrum).real
    mixing = torch.eye(3) * 0.4 + 0.6 + 0.2 * torch.randn(count, 3, 3, generator=generator)
    texture = torch.einsum("nij,njhw->nihw", mixing, texture)
    texture = texture / texture.std((1, 2, 3), keepdim=True)
    centre = 0.3 + 0.4 * torch.rand(count, 3, 1, 1, generator=generator)
    return (centre + 0.18 * texture).clamp_(0, 1)


def dead_leaves(count: int, size: int, generator: torch.Generator, leaves: int = 60) -> torch.Tensor:
    """Occluding shapes with power-law sizes (Lee, Mumford, Huang 2001), shaded with 1/f texture.

    Learning from such pictures: Baradad et al. 2021, arXiv 2106.05963.
    """
    rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
    scale = 2  # drawn at twice the size and reduced, for smooth edges
    pictures = np.empty((count, size, size, 3), np.float32)
    for picture in pictures:
        canvas = Image.new("RGB", (size * scale,) * 2, tuple(rng.integers(0, 256, 3).tolist()))
        draw = ImageDraw.Draw(canvas)
        base = rng.uniform(20, 235) + rng.normal(0, 45, 3)  # the colours of one picture belong together
        radii = np.sort(size * scale * 0.5 * (1 - rng.random(leaves) * 0.96) ** 2)[::-1]
        for radius in radii:
            _draw_leaf(draw, rng, radius, size * scale, np.clip(base + rng.normal(0, 60, 3), 0, 255))
        picture[:] = np.asarray(canvas.resize((size, size), Image.Resampling.BOX), np.float32) / 255
    shade = fractal(count, size, generator).mean(1, keepdim=True) - 0.5
    return (torch.from_numpy(pictures).permute(0, 3, 1, 2) + 0.5 * shade).clamp_(0, 1)


def pale_leaves(count: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """Dead leaves at half their contrast, which become another picture in half the iterations."""
    return 0.5 + 0.5 * (dead_leaves(count, size, generator) - 0.5)


def _draw_leaf(
    draw: ImageDraw.ImageDraw, rng: np.random.Generator, radius: float, size: int, colour: np.ndarray
) -> None:
    x, y = rng.uniform(0, size, 2)
    fill = tuple(int(c) for c in colour)
    if rng.random() < 0.5:
        wide, high = radius, radius * rng.uniform(0.4, 1)
        draw.ellipse((x - wide, y - high, x + wide, y + high), fill=fill)
        return
    angles = np.sort(rng.uniform(0, 2 * math.pi, rng.integers(3, 7)))
    draw.polygon([(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles], fill=fill)


def strokes(count: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """A few pen strokes on a plain ground, dark on light or light on dark."""
    rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
    scale, pictures = 2, np.empty((count, size, size, 3), np.float32)
    for picture in pictures:
        light, dark = rng.uniform(0.8, 1), rng.uniform(0, 0.2)
        ground, pen = (light, dark) if rng.random() < 0.8 else (dark, light)
        canvas = Image.new("L", (size * scale,) * 2, int(255 * ground))
        draw = ImageDraw.Draw(canvas)
        for _ in range(rng.integers(1, 5)):
            points = np.cumsum(rng.normal(0, 0.22, (4, 2)), 0) + rng.uniform(0.25, 0.75, 2)
            t = np.linspace(0, 1, 24)[:, None]
            weights = [(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3]  # a cubic Bezier curve
            curve = sum(w * p for w, p in zip(weights, points, strict=True)) * size * scale
            draw.line([tuple(p) for p in curve], fill=int(255 * pen), width=int(rng.integers(3, 9)), joint="curve")
        picture[:] = (np.asarray(canvas.resize((size, size), Image.Resampling.BOX), np.float32) / 255)[..., None]
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()


PROCEDURES = {
    "noise": noise,
    "fractal": fractal,
    "dead-leaves": dead_leaves,
    "pale-leaves": pale_leaves,
    "strokes": strokes,
}


def draw_starts(
    shares: dict[str, float], count: int, size: int, generator: torch.Generator, images: torch.Tensor | None = None
) -> torch.Tensor:
    """A shuffled mix of starting images in the given shares: (count, 3, size, size).

    `images` is the uint8 (M, 3, size, size) stock that the share `images` is drawn from.
    """
    names = [name for name, share in shares.items() if share > 0]
    weights = torch.tensor([shares[name] for name in names], dtype=torch.double)
    edges = (count * weights.cumsum(0) / weights.sum()).round().long().tolist()
    parts, start = [], 0
    for name, end in zip(names, edges, strict=True):
        number, start = end - start, end
        if name == "images":
            assert images is not None, "the share `images` needs images to draw from"
            chosen = torch.randint(len(images), (number,), generator=generator)
            parts.append(images[chosen].float() / 255)
        elif number:
            parts.append(PROCEDURES[name](number, size, generator))
    return torch.cat(parts)[torch.randperm(count, generator=generator)]
