"""Preparation before the first step: matched images, the teachers' outputs on them, and held-out episodes."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from accelerate import Accelerator

from ..errors import DataError
from ..pool.pool import AdapterPool
from ..runtime.array_files import Rows
from ..surrogate.dataset import SurrogateDataset
from .batches import BatchMaker
from .config import DistillationConfig
from .episodes import make_sampler
from .head_logits import own_logits
from .held_out import HeldOutEpisodes, hold_out
from .selection import CheckpointSelection
from .student import Student
from .surrogate_images import SurrogateImages, match_shards
from .teachers import FEWEST, TeacherGroup, teach_all
from .tokens import tokens_entering


class Store(Protocol):
    """Where what the recipe needs of all images comes from."""

    def teachers(
        self, pool: AdapterPool, images: SurrogateImages, groups: list[list[int]], config: DistillationConfig
    ) -> list[TeacherGroup]:
        """What groups of adapters say of their own images, as [`teach_all`] gives it."""

    def tokens(
        self,
        student: Student,
        images: SurrogateImages,
        config: DistillationConfig,
        pool: AdapterPool,
        state: Accelerator,
    ) -> Rows | None:
        """What enters the first layer that learns, as [`tokens_entering`] gives it."""

    def logits(self, pool: AdapterPool, images: SurrogateImages, held_out: Collection[int]) -> Sequence[Rows]:
        """What each adapter's head says of its own images, as [`own_logits`] gives it."""


@dataclasses.dataclass(frozen=True)
class DiskStore:
    """Computes it once and keeps it on disk.

    Attributes:
        folder: where it lies.
        shared: whether all processes see the same folder.
        progress: whether to show a bar.
    """

    folder: Path
    shared: bool
    progress: bool

    def teachers(
        self, pool: AdapterPool, images: SurrogateImages, groups: list[list[int]], config: DistillationConfig
    ) -> list[TeacherGroup]:
        return teach_all(pool, images, groups, config, self.folder, self.shared, self.progress)

    def tokens(
        self,
        student: Student,
        images: SurrogateImages,
        config: DistillationConfig,
        pool: AdapterPool,
        state: Accelerator,
    ) -> Rows | None:
        return tokens_entering(student, images, config, pool, state, self.folder, self.shared, self.progress)

    def logits(self, pool: AdapterPool, images: SurrogateImages, held_out: Collection[int]) -> Sequence[Rows]:
        return own_logits(pool, images, held_out, self.folder, self.shared)


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
    groups = store.teachers(pool, images, teachers, config)
    sampler = make_sampler(images, config, groups, held_out)
    groups = [group for group in groups if len(group.images) >= FEWEST]
    if config.relational_weight and not groups:
        raise DataError(f"The relational loss needs at least {FEWEST} surrogate images in a group of adapters.")
    tokens = store.tokens(student, images, config, pool, accelerator)
    sizes = (pool.backbone.patch_size, tokens, accelerator.process_index, accelerator.num_processes)
    logits = store.logits(pool, images, held_out) if config.kl_weight else []
    make_batch = BatchMaker(config, images, groups, sampler, logits, *sizes)
    episodes = HeldOutEpisodes(held_out, make_batch, config.metric, config.seed) if held_out else None
    group_of = {i: number for number, members in enumerate(alike) for i in members}
    selection = CheckpointSelection([pool.infos[i].name for i in held_out], [group_of[i] for i in held_out])
    return Prepared(make_batch, episodes, selection)
