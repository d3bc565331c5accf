"""What a distillation would do and cost, before it is run."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from accelerate import Accelerator

from ..backbones.flops import forward_flops, lora_flops
from ..fewshot.relations import MOST_DIRECTIONS, principal_directions
from ..pool.pool import AdapterPool
from ..runtime import plans
from ..runtime.array_files import Rows
from ..runtime.plans import Plan, Stage, peak_memory, seconds_of
from ..surrogate.dataset import SurrogateDataset
from .config import DistillationConfig
from .selection import learned
from .student import Student
from .surrogate_images import SurrogateImages
from .teachers import SAMPLE, TeacherGroup, are_asked, choose_teachers
from .trainer import MetaLoRATrainer


#: Images of a forward that is timed; the whole data set goes through at their pace.
_TIMED = 32


def plan_distillation(
    pool: AdapterPool, surrogate: SurrogateDataset | None, config: DistillationConfig | None = None
) -> Plan:
    """What a new training would do, and how long it would take here. Nothing is written.

    The student is made as the training makes it, and three of its steps are timed, on the images that it would see and
    with random numbers in place of what teachers say; so is a forward of a few images through one teacher and through
    the student, as for validations. Of single-source episodes the one forward of each image through its own adapter is
    not counted. All `steps` are counted: `patience` may end a training earlier. Memory is what the
    process held at most meanwhile.

    Raises:
        DataError, ConfigError: as [`MetaLoRATrainer`] and its `prepare` raise them.
    """
    config, begun = config or DistillationConfig(), plans.clock()
    trainer = MetaLoRATrainer(pool, surrogate, config)
    starting, device = plans.clock() - begun, pool.backbone.device
    processes, backbone = trainer.accelerator.num_processes, pool.backbone
    stages = [Stage("start", f"the student at {config.init}, from {len(trainer.pool):,} adapters", starting)]
    trained = 4 * sum(p.numel() for p in trainer.student.trainable())
    disk = trained
    if not config.steps:
        return Plan([*stages, _finish(trainer)], peak_memory(device), disk, processes)
    store, begun = _RandomStore(), plans.clock()
    trainer.prepare_from(store)
    checking = plans.clock() - begun
    try:
        images = store.images
        stages += [Stage("check", f"{len(images):,} images", checking), *_teachers(trainer, store)]
        kept = images.shards[0].tensors["kept_tokens"].shape[1] if images.masked else backbone.num_patches
        if config.first_layer:
            stages.append(_tokens(trainer, images, kept))
            disk += 2 * len(images) * (backbone.num_prefix_tokens + kept) * backbone.hidden_size
        stages.append(_learning(trainer, kept))
        if trainer.selection.adapters:
            stages.append(_validations(trainer, kept))
    finally:
        trainer.close()
    # weights, two moments of Adam and the best weights, in two checkpoints and a third while it is written
    disk += 3 * 4 * trained + _teacher_bytes(store, backbone.hidden_size)
    return Plan([*stages, _finish(trainer)], peak_memory(device), disk, processes)


@dataclasses.dataclass(frozen=True)
class _RandomRows:
    """Random numbers, float16, in place of stored rows of `shape`."""

    shape: tuple[int, ...]

    def read(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.rand(len(rows), *self.shape).half()


class _RandomStore:
    """A [`Store`] that asks nobody and remembers what it would have asked."""

    images: SurrogateImages
    groups: list[TeacherGroup]

    def teachers(
        self, pool: AdapterPool, images: SurrogateImages, groups: list[list[int]], config: DistillationConfig
    ) -> list[TeacherGroup]:
        self.images, self.groups = images, []
        for members in groups if are_asked(images, config) else ():
            rows = torch.cat([images.of_shard(i) for i in members])
            chosen = choose_teachers(members, config.max_teachers)
            width = len(chosen) * pool.backbone.hidden_size
            if min(len(rows), SAMPLE, width) > MOST_DIRECTIONS:
                width = MOST_DIRECTIONS
            self.groups.append(TeacherGroup(chosen, rows, _RandomRows((width,)), {}))
        return self.groups

    def tokens(
        self,
        student: Student,
        images: SurrogateImages,
        config: DistillationConfig,
        pool: AdapterPool,
        state: Accelerator,
    ) -> Rows | None:
        if not config.first_layer:
            return None
        pixels, kept = images.inputs(torch.arange(1), pool.backbone.patch_size)
        return _RandomRows(tuple(student.tokens(pool.backbone.normalize(pixels), kept).shape[1:]))

    def logits(self, pool: AdapterPool, images: SurrogateImages, held_out: Collection[int]) -> Sequence[Rows]:
        return [_RandomRows(shard.tensors["teacher_logits"].shape[1:]) for shard in images.shards]


def _teachers(trainer: MetaLoRATrainer, store: _RandomStore) -> list[Stage]:
    """All images of each group through all its teachers, and the compression of what they say."""
    pool, backbone = trainer.pool, trainer.pool.backbone
    asked = sum(len(group.images) * len(group.teachers) for group in store.groups)
    if not asked:
        return []
    group, folds = store.groups[0], sum(len(group.teachers) for group in store.groups)
    index = group.images[:_TIMED]
    teacher, begun = group.teachers[0], plans.clock()
    with pool.folded(teacher), torch.inference_mode():
        folded = plans.clock()

        def ask() -> None:
            hidden = store.images.hidden(backbone, index)
            F.normalize(backbone.pool_features(hidden).float(), dim=-1).cpu()

        each = seconds_of(ask, backbone.device) / len(index)
        unfolded = plans.clock()
    folding = plans.clock() - unfolded + folded - begun
    # processes share the groups: the busiest has the largest, or its part of all
    most = max(len(group.images) * len(group.teachers) for group in store.groups)
    share = max(most / asked, 1 / trainer.accelerator.num_processes)
    seconds = share * (asked * each + folds * folding) + _compressing(store, backbone.hidden_size)
    work = f"{asked:,} views of {sum(len(group.images) for group in store.groups):,} images"
    patches = store.images.shards[0].tensors["kept_tokens"].shape[1] if store.images.masked else None
    return [Stage("teachers", work, seconds, asked * forward_flops(backbone, patches) / 1e9)]


def _compressing(store: _RandomStore, width: int) -> float:
    """Seconds of the compression of all groups, by that of the smallest one that is compressed."""
    shapes = [(min(len(group.images), SAMPLE), len(group.teachers) * width) for group in store.groups]
    shapes = [shape for shape in shapes if min(shape) > MOST_DIRECTIONS]
    if not shapes:
        return 0.0
    rows, columns = min(shapes, key=math.prod)
    begun = plans.clock()
    principal_directions(torch.randn(rows, columns))
    return (plans.clock() - begun) * sum(map(math.prod, shapes)) / (rows * columns)


def _teacher_bytes(store: _RandomStore, width: int) -> int:
    """What stays on disk of all groups, and beside it the teachers' own features of the largest, meanwhile."""
    kept = [2 * len(group.images) * group.features.shape[0] for group in store.groups]  # type: ignore[attr-defined]
    whole = [2 * len(group.images) * len(group.teachers) * width for group in store.groups]
    return sum(kept) + max(whole, default=0)


def _tokens(trainer: MetaLoRATrainer, images: SurrogateImages, patches: int) -> Stage:
    """All images through the layers that do not learn."""
    backbone, first = trainer.pool.backbone, trainer.config.first_layer
    index = torch.arange(min(_TIMED, len(images)))

    def enter() -> None:
        inputs, kept = images.inputs(index, backbone.patch_size)
        kept = None if kept is None else kept.to(backbone.device)
        trainer.student.tokens(trainer.student.backbone.normalize(inputs), kept)

    each = seconds_of(enter, backbone.device) / len(index)
    flops = len(images) * forward_flops(backbone, patches) * first / len(backbone.layers)
    return Stage("tokens", f"{len(images):,} images through {first} layers", len(images) * each, flops / 1e9)


def _learning(trainer: MetaLoRATrainer, patches: int) -> Stage:
    config, backbone, numbers = trainer.config, trainer.pool.backbone, itertools.count()
    seconds = seconds_of(lambda: trainer.step(next(numbers)), backbone.device)
    batch = trainer.make_batch(0).count * config.gradient_accumulation_steps
    flops = lora_flops(backbone, trainer.student.rank, patches, config.first_layer).both
    work = f"{config.steps:,} steps of {batch} images"
    return Stage("learn", work, config.steps * seconds, config.steps * batch * flops / 1e9)


def _validations(trainer: MetaLoRATrainer, patches: int) -> Stage:
    """The student, and at first the pool's average, on the images of held-out adapters."""
    config, candidates = trainer.config, trainer.candidates
    index = candidates.held_out.images
    few = index[:_TIMED]

    @torch.no_grad()
    def look() -> None:
        with trainer.student.mixed(learned(config).alpha):
            candidates.parallel.embed(*trainer.make_batch.own_inputs(few), len(few))

    each = seconds_of(look, trainer.pool.backbone.device) / len(few)
    times = 1 + candidates.has_average + -(-config.steps // config.eval_steps)
    rank = trainer.student.rank * (2 if config.mixes else 1)
    flops = times * len(index) * lora_flops(trainer.pool.backbone, rank, patches, config.first_layer).forward
    return Stage("validate", f"{len(index):,} images {times} times", times * len(index) * each, flops / 1e9)


def _finish(trainer: MetaLoRATrainer) -> Stage:
    """The average of each domain's adapters, and what is saved."""
    begun = plans.clock()
    trainer.to_model()
    return Stage("finish", "experts and settings", plans.clock() - begun)
