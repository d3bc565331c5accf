"""Preparation before the first step: matched images, the teachers' outputs on them, and held-out episodes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

from accelerate import Accelerator

from ..errors import DataError
from ..pool.pool import AdapterPool
from ..surrogate.dataset import SurrogateDataset
from .batches import BatchMaker
from .config import DistillationConfig
from .episodes import make_sampler
from .held_out import HeldOutEpisodes, hold_out
from .selection import CheckpointSelection
from .student import Student
from .surrogate_images import match_shards
from .teachers import FEWEST, teach_all
from .tokens import tokens_entering


@dataclasses.dataclass(frozen=True)
class Store:
    """Where computed features lie.

    Attributes:
        folder: theirs.
        shared: whether all processes see the same folder.
        progress: whether to show a bar.
    """

    folder: Path
    shared: bool
    progress: bool


class Prepared(NamedTuple):
    """Batches to learn from, episodes to evaluate on (None where no adapter is held out), and an empty selection."""

    make_batch: BatchMaker
    held_out: HeldOutEpisodes | None
    selection: CheckpointSelection


def prepare(
    student: Student,
    pool: AdapterPool,
    surrogate: SurrogateDataset,
    config: DistillationConfig,
    accelerator: Accelerator,
    store: Store,
) -> Prepared:
    """Match images with adapters, hold adapters out, ask the teachers.

    Raises:
        DataError: the surrogate data is of another pool, damaged, or too small for the recipe's losses.
    """
    images = match_shards(pool, surrogate, config.use_masks)
    alike = pool.groups() if config.groups == "auto" else [list(range(len(pool)))]
    held_out = hold_out(alike, images, config.validation_fraction)
    teachers = [[i for i in members if i not in held_out] for members in alike]
    groups = teach_all(pool, images, teachers, config, store.folder, store.shared, store.progress)
    sampler = make_sampler(images, config, groups, held_out)
    groups = [group for group in groups if len(group.images) >= FEWEST]
    if config.relational_weight and not groups:
        raise DataError(f"The relational loss needs at least {FEWEST} surrogate images in a group of adapters.")
    tokens = tokens_entering(student, images, config, pool, accelerator, store.folder, store.shared, store.progress)
    sizes = (pool.backbone.patch_size, tokens, accelerator.process_index, accelerator.num_processes)
    make_batch = BatchMaker(config, images, groups, sampler, *sizes)
    episodes = HeldOutEpisodes(held_out, make_batch, config.metric, config.seed) if held_out else None
    group_of = {i: number for number, members in enumerate(alike) for i in members}
    selection = CheckpointSelection([pool.infos[i].name for i in held_out], [group_of[i] for i in held_out])
    return Prepared(make_batch, episodes, selection)
