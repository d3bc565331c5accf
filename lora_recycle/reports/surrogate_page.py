"""The page of surrogate data: images with masks and confidences, and a map before and after recycling."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from markupsafe import Markup

from ..backbones.backbone import Backbone, extract_features
from ..backbones.base_models import CONFIG_FILES, BaseModel
from ..errors import DataError
from ..images.labelled import LabelledImages
from ..runtime.terminal import counted
from ..surrogate.dataset import SurrogateDataset, evenly_spread
from .charts import charts, scatter
from .gallery import gallery
from .html_page import folded, paragraph, table, write_page
from .maps import principal_map, share_nearest_to_own, share_same_neighbour, turned


IMAGES_SHOWN = 96
MAP_CLASSES, MAP_IMAGES = 12, 20  # most classes of each kind on the map, and images of each class
AGREEMENT_IMAGES = 100  # of each adapter


@dataclasses.dataclass
class MapImages:
    """Images on a map.

    Args:
        pixels: uint8 (N, 3, H, W).
        labels: N class names, those of different adapters and data sets never the same.
        kinds: N times `surrogate` or `real`.
    """

    pixels: torch.Tensor
    labels: list[str]
    kinds: list[str]


def map_images(surrogate: SurrogateDataset, real: LabelledImages | None = None) -> MapImages:
    """Surrogate and real images for a map: a few classes of each kind, spread evenly, and a few images of each class.

    Raises:
        DataError: a shard is damaged, or the real images are of another size.
    """
    pixels, labels = [], []
    chosen = evenly_spread(surrogate.num_shards, MAP_CLASSES).tolist()
    for number in chosen:
        shard = surrogate.shard(number)
        present = shard.labels.unique()
        for label in present[evenly_spread(len(present), MAP_CLASSES // len(chosen))].tolist():
            rows = (shard.labels == label).nonzero().flatten()[:MAP_IMAGES]
            pixels.append(shard.pixels[rows])
            labels += [f"{shard.label_names[label]} ({shard.adapter['name']})"] * len(rows)
    kinds = ["surrogate"] * len(labels)
    if real is not None:
        classes = real.by_class()
        for label in [list(classes)[i] for i in evenly_spread(len(classes), MAP_CLASSES)]:
            rows = classes[label][:MAP_IMAGES]
            pixels.append(real.pixels[rows])
            labels += [f"{real.label_names[label]} ({real.name})"] * len(rows)
    kinds += ["real"] * (len(labels) - len(kinds))
    sizes = {tuple(part.shape[1:]) for part in pixels}
    if len(sizes) > 1:
        raise DataError(f"{surrogate.folder}: surrogate and real images differ in size: {sorted(sizes)}.")
    return MapImages(torch.cat(pixels), labels, kinds)


def write_surrogate_page(
    path: str | Path,
    surrogate: SurrogateDataset,
    *,
    patch_size: int | None = None,
    images: MapImages | None = None,
    views: Sequence[tuple[str, Backbone]] = (),
) -> Path:
    """Write the page atomically and return its path.

    Args:
        patch_size: side of the backbone's patches in pixels; masks are shown where it is known.
        images: what the map shows; no map without.
        views: names and the backbones that look at `images`; the maps of all are turned to lie as the first's.

    Raises:
        DataError: the data is damaged, or of another size than a backbone takes.
    """
    sample, shards = surrogate.sample(IMAGES_SHOWN), surrogate.manifest["shards"]
    captions = [f"{label}: {value:.0%}" for label, value in zip(sample.labels, sample.confidence, strict=True)]
    note = "Made from the adapters alone. Per cent: how sure the adapter is of the class."
    kept = None if patch_size is None else sample.kept_tokens
    scores = [(s["adapter"]["name"], s["num_images"], s["accuracy"], s["confidence"]) for s in shards]
    caption = "Accuracy: share of the images that their adapter classifies as intended."
    sections = [
        ("Images", gallery(sample.pixels, captions, kept, patch_size, note)),
        ("Map of the embeddings", "" if images is None else _maps(images, views) + _agreement(surrogate, views)),
        ("Adapters", table(caption, ("adapter", "images", "accuracy", "confidence"), scores)),
        ("Settings", folded("Settings of the run, as JSON", surrogate.manifest.get("config", {}))),
    ]
    title = f"{counted(len(surrogate), 'surrogate image')} of {counted(surrogate.num_shards, 'adapter')}"
    return write_page(path, title, sections)


def read_patch_size(surrogate: SurrogateDataset) -> int | None:
    """Side of the patches of the backbone that the data was made on, from its configuration alone.

    Returns:
        None where the manifest names no backbone, or one whose configuration is not available.
    """
    base = surrogate.manifest.get("backbone", {})
    try:
        return BaseModel.pull(base["name"], base.get("revision"), CONFIG_FILES).tower_config().patch_size
    except (KeyError, ValueError):
        return None


def _maps(images: MapImages, views: Sequence[tuple[str, Backbone]]) -> Markup:
    """One map for each view, and a table of how well classes stand apart in each."""
    figures, rows, first = [], [], None
    for name, backbone in views:
        features = extract_features(backbone, images.pixels)
        points, shown = principal_map(features)
        first = points if first is None else first
        heading = f"{name}: two axes show {shown:.0%} of the variance"
        figures.append(scatter(heading, turned(points, first), images.labels, images.kinds))
        rows.append((name, *(_share(features, images, kind) for kind in dict.fromkeys(images.kinds))))
    note = paragraph(
        "Principal components of the embeddings. A line leads from each image to the middle of its class, where its "
        "name stands."
    )
    caption = (
        "Per cent of images nearest to the prototype of their own class among those of its kind, in all dimensions."
    )
    return note + charts(figures) + table(caption, ("", *dict.fromkeys(images.kinds)), rows)


def _agreement(surrogate: SurrogateDataset, views: Sequence[tuple[str, Backbone]]) -> Markup:
    """How often each view finds the same image nearest as the adapter that the images are of."""
    parts: dict[str, list[float]] = {name: [] for name, _ in views}
    for number in evenly_spread(surrogate.num_shards, MAP_CLASSES).tolist():
        shard = surrogate.shard(number)
        rows = evenly_spread(len(shard), AGREEMENT_IMAGES)
        if len(rows) > 1:
            for name, backbone in views:
                features = extract_features(backbone, shard.pixels[rows])
                parts[name].append(share_same_neighbour(features, shard.teacher_features[rows]))
    shown = [(name, f"{100 * sum(shares) / len(shares):.1f}") for name, shares in parts.items() if shares]
    caption = "Per cent of images whose nearest other image of their adapter is the same as for that adapter."
    return table(caption, ("", "agreement"), shown) if shown else Markup()


def _share(features: torch.Tensor, images: MapImages, kind: str) -> str:
    rows = [i for i, other in enumerate(images.kinds) if other == kind]
    share = share_nearest_to_own(features[rows], [images.labels[i] for i in rows])
    return "-" if share is None else f"{100 * share:.1f}"
