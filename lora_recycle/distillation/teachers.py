"""What the teachers say of the surrogate images, computed once before training and kept on disk."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from ..fewshot.relations import principal_directions
from ..pool.pool import AdapterPool
from ..runtime.array_files import RowFile, Rows, open_rows, write_rows
from ..runtime.files import atomic_write
from ..runtime.heartbeat import Heartbeat, beat
from ..runtime.launch import claim_indices
from ..surrogate.dataset import evenly_spread
from .config import DistillationConfig
from .surrogate_images import SurrogateImages


#: Images among which similarities say something, at least.
FEWEST = 4
#: Images from which the directions of a compression are learnt, and images that are in memory at a time.
SAMPLE, _CHUNK = 4096, 256


@dataclasses.dataclass
class TeacherGroup:
    """Surrogate images that the same adapters teach.

    `images` (N,) are image numbers; `features` float16 (N, D), on disk, have as inner products the mean cosine
    similarity over the teachers. `votes` maps (teacher, shard, class) to the class of its own head that the teacher
    sees in more than half of these images.
    """

    teachers: list[int]
    images: torch.Tensor
    features: Rows
    votes: dict[tuple[int, int, int], int]


def choose_teachers(members: list[int], most: int) -> list[int]:
    """At most `most` of a group's adapters, spread evenly over it.

    The same for all images of the group: the means of different teachers could not be compared.
    """
    return [members[i] for i in evenly_spread(len(members), most).tolist()]


def are_asked(images: SurrogateImages, config: DistillationConfig) -> bool:
    """Whether a recipe needs what teachers say: for the relational loss, or to match classes without names."""
    nameless = any(not shard.adapter.get("labels") for shard in images.shards)
    return config.relational_weight > 0 or (config.interpolation_weight > 0 and nameless)


def teach(
    pool: AdapterPool,
    images: SurrogateImages,
    members: list[int],
    teachers: list[int],
    folder: Path,
    progress: bool = True,
    batch_size: int = 128,
) -> TeacherGroup:
    """The teachers' view of the images of a group of adapters (`members`), kept in `folder`.

    Where images are masked the teachers see what the student sees: held to targets of whole images, it would learn to
    make up for missing tokens, which at use are there.
    Time is linear in images x teachers; memory does not depend on the number of images. What a run that was killed
    left is used again where backbone, teachers and images are the same.
    """
    rows = torch.cat([images.of_shard(i) for i in members])
    path = folder / f"{_identity(pool, images, members, teachers)}.npy"
    votes = path.with_suffix(".json")
    if not votes.is_file():
        _ask(pool, images, members, rows, teachers, path, progress, batch_size)
    votes_by_class = {(t, s, c): d for t, s, c, d in json.loads(votes.read_text(encoding="utf-8"))}
    return TeacherGroup(teachers, rows, open_rows(path), votes_by_class)


def teach_all(
    pool: AdapterPool,
    images: SurrogateImages,
    groups: list[list[int]],
    config: DistillationConfig,
    folder: Path,
    shared: bool,
    progress: bool = True,
) -> list[TeacherGroup]:
    """What `groups` of adapters say, each of its own images; nothing where the recipe does not need it. Processes that
    share the folder (`shared`) share the groups."""
    if not are_asked(images, config):
        return []
    chosen = [(members, choose_teachers(members, config.max_teachers)) for members in groups]
    if shared:
        with Heartbeat("ask teachers") as heart:
            for i in claim_indices(len(chosen)):
                teach(pool, images, *chosen[i], folder, progress)
            heart.wait_for_all()
    return [teach(pool, images, members, teachers, folder, progress) for members, teachers in chosen]


@torch.inference_mode()
def _ask(
    pool: AdapterPool,
    images: SurrogateImages,
    members: list[int],
    rows: torch.Tensor,
    teachers: list[int],
    path: Path,
    progress: bool,
    batch_size: int,
) -> None:
    """Forward all images through all teachers; features go to the disk teacher by teacher, then image by image."""
    blocks, votes, folder = [], [], path.with_suffix(".blocks")
    shape = (len(rows), pool.backbone.hidden_size)
    try:
        for i in tqdm(teachers, desc="teachers", unit="adapter", disable=not progress):
            said = torch.full((len(rows),), -1) if pool[i].head is not None else None
            views = _views(pool, images, rows, i, said, len(teachers), batch_size)
            blocks.append(write_rows(folder / f"{i}.npy", np.float16, shape, views))
            votes += [] if said is None else [[i, *vote] for vote in _majorities(images, members, said)]
        _join(blocks, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    atomic_write(path.with_suffix(".json"), json.dumps(votes).encode())  # the last: it says that both are there


def _views(
    pool: AdapterPool,
    images: SurrogateImages,
    rows: torch.Tensor,
    teacher: int,
    said: torch.Tensor | None,
    of: int,
    batch_size: int,
) -> Iterator[torch.Tensor]:
    """One teacher's unit features by the root of the number of teachers, batch by batch; its classes go to `said`."""
    with pool.folded(teacher) as backbone:
        for start in range(0, len(rows), batch_size):
            beat(f"teacher {pool[teacher].info.name}, image {start} of {len(rows)}")
            hidden = images.hidden(backbone, rows[start : start + batch_size])
            if said is not None:
                logits = pool[teacher].logits(backbone, hidden)
                said[start : start + batch_size] = logits.argmax(1).cpu()
            yield (F.normalize(backbone.pool_features(hidden).float(), dim=-1).cpu() / of**0.5).half()


def _join(blocks: list[RowFile], path: Path) -> None:
    """Concatenate the teachers' features, (N, D) each, to (N, T x D), compressed where that is much."""
    count, width = len(blocks[0]), sum(block.shape[1] for block in blocks)
    sample = evenly_spread(count, SAMPLE)
    directions = principal_directions(torch.cat([block.read(sample) for block in blocks], 1))
    chunks = (
        torch.cat([block.read_range(start, start + _CHUNK) for block in blocks], 1)
        for start in range(0, count, _CHUNK)
    )
    if directions is not None:
        width, chunks = directions.shape[1], ((chunk.float() @ directions).half() for chunk in chunks)
    write_rows(path, np.float16, (count, width), chunks)


def _majorities(images: SurrogateImages, members: list[int], said: torch.Tensor) -> list[list[int]]:
    """[shard, class, said class] wherever more than half of a class's images were said to show one class."""
    majorities = []
    for shard, here in zip(members, said.split([len(images.shards[i]) for i in members]), strict=True):
        labels = images.shards[shard].labels
        for c in labels.unique().tolist():
            values, counts = here[labels == c].unique(return_counts=True)
            if counts.max() * 2 > counts.sum():
                majorities.append([shard, c, int(values[counts.argmax()])])
    return majorities


def _identity(pool: AdapterPool, images: SurrogateImages, members: list[int], teachers: list[int]) -> str:
    parts: list[Any] = [pool.backbone.name, pool.backbone.revision, str(pool.backbone.dtype), images.masked, members]
    parts += [[pool[i].info.sha256 for i in teachers], [images.checksums[i] for i in members]]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
