"""What each adapter's own head says of its own images, the targets of single-source episodes (Eq. 7)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..pool.pool import AdapterPool
from ..runtime.array_files import RowFile, open_rows, write_rows
from ..runtime.heartbeat import Heartbeat, beat
from ..runtime.launch import claim_indices
from .surrogate_images import SurrogateImages


def own_logits(
    pool: AdapterPool, images: SurrogateImages, held_out: Collection[int], folder: Path, shared: bool
) -> list[RowFile]:
    """Logits float32 (n, C) for each adapter, on the patches that the student sees of its images.

    Of whole images they are in the shards. Of the kept patches each adapter is asked once, and the answers are stored
    in `folder` under names that say what they depend on: held to logits of the whole image, the student would learn to
    be surer of a quarter of it than its own teacher is. Those of `held_out` adapters, which no episode has, are not
    computed. Processes that share the folder (`shared`) share the adapters.
    """
    stored = [shard.tensors["teacher_logits"] for shard in images.shards]
    if not images.masked:
        return stored
    asked = [i for i in range(len(pool)) if i not in held_out]
    if shared:
        with Heartbeat("ask heads") as heart:
            for number in claim_indices(len(asked)):
                _ask(pool, images, asked[number], folder)
            heart.wait_for_all()
    return [_ask(pool, images, i, folder) if i in asked else rows for i, rows in enumerate(stored)]


def _ask(pool: AdapterPool, images: SurrogateImages, adapter: int, folder: Path) -> RowFile:
    parts: list[Any] = [pool.backbone.name, pool.backbone.revision, str(pool.backbone.dtype)]
    parts += [pool.infos[adapter].sha256, pool.infos[adapter].prompt, images.checksums[adapter]]
    path = folder / f"logits-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]}.npy"
    if not path.is_file():
        shape = images.shards[adapter].tensors["teacher_logits"].shape
        write_rows(path, np.float32, shape, _answers(pool, images, adapter))
    return open_rows(path)


@torch.inference_mode()
def _answers(
    pool: AdapterPool, images: SurrogateImages, adapter: int, batch_size: int = 128
) -> Iterator[torch.Tensor]:
    numbers = images.of_shard(adapter)
    with pool.folded(adapter) as backbone:
        for rows in numbers.split(batch_size):
            beat(f"head of {pool.infos[adapter].name}, image {int(rows[0] - numbers[0])} of {len(numbers)}")
            yield pool[adapter].logits(backbone, images.hidden(backbone, rows)).float().cpu()
