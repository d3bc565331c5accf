"""What an inversion would do and cost, before it is run."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from statistics import fmean

import torch

from ..backbones.flops import forward_flops, inversion_flops
from ..backbones.token_selection import num_kept
from ..runtime import plans
from ..runtime.launch import process_state
from ..runtime.plans import Plan, Stage, peak_memory, seconds_of
from ..surrogate.dataset import evenly_spread
from .batch import STOP_EVERY, InversionBatch
from .config import InversionConfig
from .inverter import LoRAInverter
from .starts import draw_starts


#: Adapters that are tried, and images of each that are optimised to their end where images may stop early.
TRIED, _IMAGES = 3, 8


def plan_inversion(inverter: LoRAInverter, output_dir: str | Path | None = None) -> Plan:
    """What `inverter.run(output_dir)` would do, and how long it would take here. Nothing is written.

    Three adapters are read and folded in. On a batch of the first one three steps are timed, and on a fourth of it, so
    that the cost of batches from which images have left is known. Where images may stop early (`stop_at`), a few of
    each of the three adapters are optimised to their end, which tells how many iterations images take. Memory is what
    the process held at most meanwhile.

    Args:
        output_dir (*optional*): finished shards there are left out, as `run` leaves them out.

    Raises:
        ConfigError: `output_dir` holds shards of another recipe.
    """
    todo = list(range(len(inverter.pool)))
    if output_dir is not None:
        inverter.check_folder(output_dir)
        todo = inverter.unfinished(output_dir)
    counts = [_num_images(inverter, i) for i in todo]
    config, backbone, total = inverter.config, inverter.backbone, sum(counts)
    processes = process_state().num_processes
    notes = [f"{len(inverter.pool) - len(todo)} finished shards are kept"] if len(todo) < len(inverter.pool) else []
    if not todo:
        return Plan([], peak_memory(backbone.device), 0, processes, notes)
    cost = _measure(inverter, todo)
    optimised = sum(
        cost.optimising(min(config.batch_size, count - start))
        for count in counts
        for start in range(0, count, config.batch_size)
    )
    share = -(-len(todo) // processes) / len(todo)  # of the work that the busiest process has
    images, mean = f"{total:,} images", sum(cost.alive)
    flops = {start: inversion_flops(backbone, _prune(config, start)).both for start in cost.steps}
    iterating = total * sum(alive * flops[cost.phase(i)] for i, alive in enumerate(cost.alive))
    stages = [
        Stage("read", f"{len(todo):,} adapters", share * len(todo) * cost.reading),
        Stage("starts", f"{images} drawn", share * total * cost.drawing),
        Stage("optimise", f"{images}, {mean:.3g} iterations each", share * optimised, iterating / 1e9),
        Stage("describe", f"{images} once", share * total * cost.describing, total * forward_flops(backbone) / 1e9),
    ]
    if cost.stopping:
        notes.append(
            f"images stop after {mean:.3g} of {config.iterations} iterations on average, as {cost.stopping} images of "
            f"{min(TRIED, len(todo))} adapters did"
        )
    disk = sum(count * _image_bytes(inverter, i) for i, count in zip(todo, counts, strict=True))
    return Plan(stages, peak_memory(backbone.device), disk, processes, notes)


@dataclasses.dataclass
class _Cost:
    """Seconds: `reading` of an adapter, `drawing` and `describing` of an image, and `steps`, of each phase of the
    iterations (first iteration to seconds of any step and of each of its images). `alive` is the share of images still
    optimised, by iteration, as `stopping` images showed (0: none may stop)."""

    reading: float
    drawing: float
    describing: float
    steps: dict[int, tuple[float, float]]
    alive: list[float]
    stopping: int = 0

    def phase(self, iteration: int) -> int:
        """The first iteration of the phase that an iteration is of."""
        return max(start for start in self.steps if start <= iteration)

    def optimising(self, size: int) -> float:
        """Seconds of a batch of `size` images, of which each is alive on its own."""
        seconds = 0.0
        for iteration, alive in enumerate(self.alive):
            fixed, each = self.steps[self.phase(iteration)]
            seconds += fixed * (1 - (1 - alive) ** size) + each * size * alive
        return seconds


def _measure(inverter: LoRAInverter, todo: list[int]) -> _Cost:
    config, device = inverter.config, inverter.backbone.device
    reading, drawing, describing, steps = [], [], 0.0, {}
    alive, seen = torch.zeros(config.iterations), 0
    for number, at in enumerate(evenly_spread(len(todo), TRIED).tolist()):
        index = todo[at]
        size = min(config.batch_size, _num_images(inverter, index))
        labels = torch.arange(size) % _num_classes(inverter, index)
        begun = plans.clock()
        starts = _draw(inverter, size)
        drawing.append((plans.clock() - begun) / size)
        few = slice(min(size, _IMAGES))
        begun = plans.clock()
        with inverter.pool.folded(index):
            folded = plans.clock()
            if number == 0:
                pixels = (starts[few] * 255).to(torch.uint8)
                describe = functools.partial(inverter.describe, inverter.pool[index], pixels)
                describing = seconds_of(describe, device) / len(pixels)
                steps = {start: _step_cost(inverter, index, starts, labels, start) for start in _phases(config)}
            if _may_stop(config):
                alive += _alive(inverter, index, starts[few], labels[few])
                seen += len(starts[few])
            unfolded = plans.clock()
        reading.append(plans.clock() - unfolded + folded - begun)
    shares = (alive / seen).tolist() if seen else [1.0] * config.iterations
    return _Cost(fmean(reading), fmean(drawing), describing, steps, shares, seen)


def _step_cost(
    inverter: LoRAInverter, index: int, starts: torch.Tensor, labels: torch.Tensor, iteration: int
) -> tuple[float, float]:
    """Seconds of a step at an iteration whatever its images, and of each of them, from two sizes of batch."""
    seconds = {}
    for size in sorted({max(1, len(starts) // 4), len(starts)}):
        batch = inverter.batch(index, starts[:size], labels[:size], torch.Generator().manual_seed(0))

        def step(batch: InversionBatch = batch) -> None:
            batch.iteration = iteration
            batch.step()

        seconds[size] = seconds_of(step, inverter.backbone.device)
    (small, less), (large, more) = min(seconds.items()), max(seconds.items())
    each = min(more / large, max(0.0, (more - less) / max(1, large - small))) if large > small else more / large
    return more - each * large, each


def _alive(inverter: LoRAInverter, index: int, starts: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """How many of some images are still optimised in each iteration, which are all run: float32 (iterations,)."""
    batch = inverter.batch(index, starts, labels, torch.Generator().manual_seed(0))
    alive = torch.zeros(inverter.config.iterations)
    while len(batch.labels):
        alive[batch.iteration] = len(batch.labels)
        batch.step()
        if (finished := batch.finished()).any():
            batch.keep(~finished)
    return alive


def _draw(inverter: LoRAInverter, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(inverter.config.seed)
    return draw_starts(inverter.config.starts, count, inverter.backbone.image_size, generator, inverter.stock)


def _may_stop(config: InversionConfig) -> bool:
    return config.stop_at < 1 and config.iterations > STOP_EVERY


def _phases(config: InversionConfig) -> list[int]:
    """The iterations from which on steps cost something else."""
    pruned = [config.prune_start] if config.prune and 0 < config.prune_start < config.iterations else []
    return [0, *pruned] if config.iterations else []


def _prune(config: InversionConfig, iteration: int) -> dict[int, float] | None:
    return config.prune if iteration >= config.prune_start else None


def _num_classes(inverter: LoRAInverter, index: int) -> int:
    info = inverter.pool.infos[index]
    return info.num_classes or len(info.labels or ()) or inverter.pool[index].num_classes


def _num_images(inverter: LoRAInverter, index: int) -> int:
    config, classes = inverter.config, _num_classes(inverter, index)
    return config.images_per_class * (classes if config.max_classes is None else min(classes, config.max_classes))


def _image_bytes(inverter: LoRAInverter, index: int) -> int:
    """Of one image in a shard: pixels, label, logits, features and kept tokens."""
    config, backbone = inverter.config, inverter.backbone
    kept = num_kept(backbone.num_patches, config.keep_ratio) if config.keep_ratio < 1 else 0
    logits = 4 * _num_classes(inverter, index)
    return 3 * backbone.image_size**2 + 8 + logits + 2 * backbone.hidden_size + 2 * kept
