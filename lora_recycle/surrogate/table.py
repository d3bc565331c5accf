"""Surrogate data as the table that `datasets.load_dataset` opens."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..runtime.terminal import printable


if TYPE_CHECKING:
    import datasets


def to_table(shards: Sequence[Any]) -> datasets.Dataset:
    """Of [`dataset.Shard`]s: `image`, `label` (`ClassLabel`, "<adapter>/<class>") and `adapter` of all images."""
    import datasets
    from PIL import Image

    names = [printable(f"{shard.adapter['name']}/{name}") for shard in shards for name in shard.label_names]
    offsets = [0]
    for shard in shards:
        offsets.append(offsets[-1] + len(shard.label_names))

    def rows() -> Iterator[dict[str, Any]]:
        for shard, offset in zip(shards, offsets, strict=False):
            for pixels, label in zip(shard.pixels, shard.labels.tolist(), strict=True):
                image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
                yield {"image": image, "label": offset + label, "adapter": printable(shard.adapter["name"])}

    features = {
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=told_apart(names)),
        "adapter": datasets.Value("string"),
    }
    return datasets.Dataset.from_list(list(rows()), features=datasets.Features(features))


def told_apart(names: Sequence[str]) -> list[str]:
    """The names, equal ones with a number: a `ClassLabel` has no name twice."""
    times, taken, result = collections.Counter(names), set(names), []
    for name in names:
        shown, number = name, 0
        while times[name] > 1 and shown in taken:
            number += 1
            shown = f"{name} ({number})"
        taken.add(shown)
        result.append(shown)
    return result
