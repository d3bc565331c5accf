"""What a step of training needs, read from disk by a background thread while the model is at the step before."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from ..runtime.array_files import Rows
from .augmentation import augment, draw_changes
from .config import DistillationConfig
from .episodes import EpisodeSampler, SurrogateEpisode
from .parallel import own_rows
from .surrogate_images import SurrogateImages
from .teachers import FEWEST, TeacherGroup


@dataclasses.dataclass
class Batch:
    """The images of a step, each once, with the teachers' outputs on them.

    Attributes:
        inputs: uint8 images (U, 3, H, W); or patches (U, k, 3, p, p) where only those `kept`, int64 (U, k), are
            forwarded; or float16 tokens (U, T, D) where those before `first_layer` do not change. Of several
            processes each has its share of the U images, [`own_rows`].
        count: U, the images of all processes.
        parts: for each relational block, then for support and query of each episode, its rows of the U images.
        teachers: float16 (b, D) for each relational block.
        weights: of each relational block in the loss, in sum 1.
        logits: float32 (queries, ways) for each episode, None for an interpolated one.
    """

    inputs: torch.Tensor
    kept: torch.Tensor | None
    count: int
    parts: list[torch.Tensor]
    teachers: list[torch.Tensor]
    episodes: list[SurrogateEpisode]
    logits: list[torch.Tensor | None]
    weights: list[float]

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        """The batch with `change` done to its tensors: moved, pinned."""

        def changed(value: Any) -> Any:
            if isinstance(value, list):
                return [changed(v) for v in value]
            return change(value) if isinstance(value, torch.Tensor) else value

        names = ("inputs", "kept", "parts", "teachers", "logits")
        return dataclasses.replace(self, **{name: changed(getattr(self, name)) for name in names})


class BatchMaker:
    """Draws and reads the batch of a step, which depends on the seed and the step alone.

    Args:
        patch_size: side of a patch, in pixels.
        sampler: needed where the recipe has episodes.
        logits: from [`own_logits`], needed where it has single-source ones.
        tokens: from [`store_tokens`], instead of images.
        process, num_processes: which of how many this process is; all draw the same batch, each reads its share.
    """

    def __init__(
        self,
        config: DistillationConfig,
        images: SurrogateImages,
        groups: list[TeacherGroup],
        sampler: EpisodeSampler | None,
        logits: Sequence[Rows],
        patch_size: int,
        tokens: Rows | None = None,
        process: int = 0,
        num_processes: int = 1,
    ):
        self.config, self.images, self.groups, self.sampler, self.logits = config, images, groups, sampler, logits
        self.patch_size, self.tokens, self.process, self.num_processes = patch_size, tokens, process, num_processes
        #: patches in a row of an image
        self.grid = images.shards[0].tensors["pixels"].shape[-1] // patch_size
        sizes = [len(group.images) if config.balance == "images" else 1 for group in groups]
        self._weights = [size / sum(sizes) for size in sizes]

    def __call__(self, step: int) -> Batch:
        config = self.config
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        index, teachers, episodes = [], [], []
        if config.relational_weight:
            share = max(FEWEST, config.relational_batch // len(self.groups))
            for group in self.groups:
                chosen = torch.randperm(len(group.images), generator=generator)[:share]
                index.append(group.images[chosen])
                teachers.append(group.features.read(chosen))
        for weight, draw in ((config.kl_weight, "single_source"), (config.interpolation_weight, "interpolated")):
            if weight:
                episodes += [getattr(self.sampler, draw)(generator) for _ in range(config.episodes)]
        index += [part.flatten() for episode in episodes for part in (episode.support, episode.query)]
        unique, rows = torch.cat(index).unique(return_inverse=True)
        inputs, kept = self.own_inputs(unique)
        if config.augment:
            draws = draw_changes(len(unique), generator)[own_rows(len(unique), self.process, self.num_processes)]
            inputs, kept = augment(inputs, kept, self.grid, draws)
        parts = list(rows.split([len(part) for part in index]))
        logits = [self._logits(episode) for episode in episodes]
        return Batch(inputs, kept, len(unique), parts, teachers, episodes, logits, self._weights)

    def own_inputs(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`inputs` and `kept` of a `Batch`: this process's share of images (U,)."""
        index = index[own_rows(len(index), self.process, self.num_processes)]
        if self.tokens is not None:
            return self.tokens.read(index), None
        return self.images.inputs(index, self.patch_size)

    def _logits(self, episode: SurrogateEpisode) -> torch.Tensor | None:
        """What the source adapter's own head says of the queries, cut to the episode's classes."""
        if episode.source is None:
            return None
        rows = episode.query.flatten() - self.images.starts[episode.source]
        return self.logits[episode.source].read(rows)[:, episode.classes]


class Prefetcher:
    """Makes the batch of the next step in a thread while the caller works on the one it got.

    The batches are the same as without: each depends on its step alone, and one thread makes them all.
    """

    def __init__(self, make: Callable[[int], Batch], end: int, pin_memory: bool = False):
        self.make, self.end, self.pin_memory = make, end, pin_memory
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._next: tuple[int, Future] | None = None

    def get(self, step: int) -> Batch:
        """The batch of `step`; the one after it is begun."""
        if self._next is None or self._next[0] != step:
            self.begin(step)
        assert self._next is not None  # begun here or before
        batch = self._next[1].result()
        self._next = None
        if step + 1 < self.end:
            self.begin(step + 1)
        return batch

    def begin(self, step: int) -> None:
        self._next = (step, self._thread.submit(self._make, step))

    def _make(self, step: int) -> Batch:
        batch = self.make(step)
        return batch.map(torch.Tensor.pin_memory) if self.pin_memory else batch

    def close(self) -> None:
        """Wait for the thread and end it."""
        self._thread.shutdown(cancel_futures=True)
