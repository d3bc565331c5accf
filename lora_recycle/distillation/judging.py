"""How good the student is, told by surrogate images of adapters that teach nothing: the best that was judged is kept.

Measured (examples/choose_without_images.py): by agreement with teachers, and on images of adapters that taught, a
student looks better with every step, while its accuracy on real images falls. On the classes of adapters that it never
met it looks worse where it is worse, if it learns by similarities; one that learns by episodes learns this figure too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from ..errors import DataError
from ..fewshot.accuracy import prototype_accuracy
from ..fewshot.episodes import EpisodeSet, sample_episodes
from ..runtime.heartbeat import beat
from .student import Blend
from .surrogate_images import SurrogateImages
from .teachers import spread


if TYPE_CHECKING:
    from .batches import BatchMaker


#: Stands for the pool's average where others are judged against it.
AVERAGE = Blend(0.0, 0.0)
#: What is noted of each judgement in `Judgements`.
SERIES = ("steps", "blends", "figures", "margins", "rises")
#: A smaller group of like adapters teaches as a whole.
SMALLEST_GROUP = 4
#: Adapters that students are judged by, at most; classes of each, images of each class, and episodes on them.
MOST_ADAPTERS, _CLASSES, _IMAGES, _EPISODES = 16, 10, 6, 60
_WAYS, _SHOTS = 5, 1
#: Images that are forwarded at a time.
_BATCH = 128


def hold_out(groups: list[list[int]], images: SurrogateImages, share: float) -> list[int]:
    """Adapters that are to teach nothing: `share` of each group of `SMALLEST_GROUP` or more, spread evenly over it.

    At least one of a group, at most `MOST_ADAPTERS` in all, none whose images make no episode; none of smaller groups.
    """
    large = [group for group in groups if share and len(group) >= SMALLEST_GROUP]
    found: list[int] = []
    for group in large:
        usable = [i for i in group if len(_classes(images.shards[i].labels)) > 1]
        most = min(max(1, round(share * len(group))), max(1, MOST_ADAPTERS // len(large)))
        found += spread(torch.tensor(usable), most).tolist()
    return sorted(found)


#: From this process's share of a batch, as `Batch` has it, and how many images the batch has, to features (B, D).
Embed: TypeAlias = Callable[[torch.Tensor, torch.Tensor | None, int], torch.Tensor]


class Judge:
    """Judges a student by few-shot episodes on the surrogate images of held-out adapters, read from disk each time.

    Always the same episodes in the same batches: equal weights get equal figures, whenever and, but for rounding, on
    however many processes.

    Args:
        held_out: numbers of adapters, from [`hold_out`].
        make_batch: reads this process's share of images.
        metric: of the class centres, as `prototype_accuracy` has it.
    """

    def __init__(self, held_out: list[int], make_batch: BatchMaker, metric: str, seed: int):
        self._make_batch, self._metric = make_batch, metric
        self._images: list[torch.Tensor] = []
        self._episodes: list[EpisodeSet] = []
        for adapter in held_out:
            labels = make_batch.images.shards[adapter].labels
            chosen = torch.cat([index[:_IMAGES] for index in _classes(labels)[:_CLASSES]])
            ways = min(_WAYS, len(labels[chosen].unique()))
            drawn = sample_episodes(labels[chosen], ways, _SHOTS, _IMAGES - _SHOTS, _EPISODES, seed)
            self._images.append(make_batch.images.of_shard(adapter)[chosen])
            self._episodes.append(drawn)

    @torch.no_grad()
    def __call__(self, embed: Embed) -> torch.Tensor:
        """Per cent of queries that go to the wrong class centre, by episode: float32 (E,)."""
        features = []
        for index in torch.cat(self._images).split(_BATCH):
            beat("judging")
            features.append(embed(*self._make_batch.own_inputs(index), len(index)).float().cpu())
        parts = torch.cat(features).split([len(images) for images in self._images])
        errors = []
        for part, episodes in zip(parts, self._episodes, strict=True):
            try:
                errors.append(100 - prototype_accuracy(part, episodes, self._metric))
            except DataError:  # features that are not finite
                errors.append(torch.full((len(episodes),), 100.0))
        return torch.cat(errors)


def _classes(labels: torch.Tensor) -> list[torch.Tensor]:
    """Where each class of enough images for an episode has them."""
    found = [(labels == c).nonzero().flatten() for c in labels.unique().tolist()]
    return [index for index in found if len(index) > _SHOTS]


@dataclasses.dataclass
class Judgements:
    """What was judged so far.

    Attributes:
        adapters: names of those held out; empty where nothing is judged.
        groups: of like adapters, the number of each one's.
        steps: how many steps were done at each judgement; the first is of the start.
        blends: what was judged, `[learnt, init]` of [`Blend`]; `[0, 0]` is the pool's average.
        figures: mean error of each, per cent.
        margins: half the 95% interval of its paired difference to the first: 1.96 standard errors over the episodes.
        rises: how much the error is significantly above the first: the lower end of the paired 95% interval over the
            episodes, of all of them or of the group that fares worst. At most 0: it may be no worse.
        first: (E,) the first's error in each episode.
        weights: the student's trainable weights at the best, in main memory.
    """

    adapters: list[str] = dataclasses.field(default_factory=list)
    groups: list[int] = dataclasses.field(default_factory=list)
    steps: list[int] = dataclasses.field(default_factory=list)
    blends: list[list[float]] = dataclasses.field(default_factory=list)
    figures: list[float] = dataclasses.field(default_factory=list)
    margins: list[float] = dataclasses.field(default_factory=list)
    rises: list[float] = dataclasses.field(default_factory=list)
    first: torch.Tensor | None = None
    weights: list[torch.Tensor] = dataclasses.field(default_factory=list)

    def add(self, step: int, blend: Blend, errors: torch.Tensor, parameters: list[torch.nn.Parameter]) -> None:
        """Take note of a judgement, `errors` (E,) by episode, as many of each adapter, and of the weights if it is the
        best."""
        errors = errors.cpu()
        self.first = errors if self.first is None else self.first
        change = errors - self.first
        groups = torch.tensor(self.groups).repeat_interleave(len(errors) // len(self.groups))
        self.steps.append(step)
        self.blends.append([*blend])  # a list, as JSON gives it back
        self.figures.append(errors.mean().item())
        parts = [change, *(change[groups == g] for g in groups.unique())]
        margins = [1.96 * part.std().item() / math.sqrt(len(part)) for part in parts]
        self.margins.append(margins[0])
        self.rises.append(max(part.mean().item() - margin for part, margin in zip(parts, margins, strict=True)))
        if self._best == len(self.steps) - 1:
            self.weights = [parameter.detach().to("cpu", copy=True) for parameter in parameters]

    @property
    def _best(self) -> int:
        """The lowest step not significantly above the first, overall or in a group; else the lowest start.

        Of the groups of a mixed pool small ones gain most easily at the expense of the largest, of which most adapters
        are. There the figure, which begins with the average, is a guard and no more: what is better on real images by
        a point moves it by a few tenths, as chance does, so to ask for an improvement would throw away most of what
        there is. Where the start itself is the first, as in a pool of one group, there is less to be gained, and what
        is learnt must be significantly below it.
        """
        sound = [i for i, rise in enumerate(self.rises) if rise <= 0]
        learnt = [i for i in sound if self.steps[i] > 0]
        if not self._against_average:
            learnt = [i for i in learnt if self.figures[0] - self.figures[i] > self.margins[i]]
        starts = [i for i in sound if self.steps[i] == 0]
        return min(learnt or starts, key=self.figures.__getitem__, default=0)

    @property
    def _against_average(self) -> bool:
        return bool(self.blends) and self.blends[0] == [*AVERAGE]

    @property
    def best_step(self) -> int | None:
        """Steps after which the student was best; None where nothing was judged."""
        return self.steps[self._best] if self.steps else None

    @property
    def in_vain(self) -> int:
        """How many judgements there were after later steps than the best."""
        return sum(step > self.steps[self._best] for step in self.steps)

    @torch.no_grad()
    def put_on_best(self, parameters: list[torch.nn.Parameter]) -> Blend | None:
        """Set the student's trainable weights to those of the best judgement, bit for bit. Returns what was judged of
        them then, None where nothing was judged."""
        if not self.steps:
            return None
        for parameter, weight in zip(parameters, self.weights, strict=True):
            parameter.copy_(weight)
        return Blend(*self.blends[self._best])

    def to_dict(self) -> dict[str, Any] | None:
        """For the sidecar, JSON; None where nothing was judged."""
        if not self.steps:
            return None
        told = {name: list(getattr(self, name)) for name in ("adapters", "groups", *SERIES)}
        return {"who": self.who} | told | {"best_step": self.best_step, "best_blend": self.blends[self._best]}

    @property
    def who(self) -> str:
        """What the errors were measured on."""
        return f"{len(self.adapters)} validation adapter{'s' * (len(self.adapters) != 1)}"

    def verdict(self) -> str:
        """What is kept and why, in a sentence."""
        if not self.steps:
            return (
                f"No validation was possible, so the last step is kept: it needs {SMALLEST_GROUP} similar adapters "
                "with 2 images per class. Add adapters, or set `held_out` to 0."
            )
        first, best, last = self.figures[0], self.figures[self._best], self.figures[-1]
        where, start = f"on the classes of {self.who}", "average" if self._against_average else "start"
        if self._best == 0:
            group = ", overall or in one of their groups," if len(set(self.groups)) > 1 else ""
            makes = (
                f"a significantly larger error{group}" if self._against_average else "no significantly smaller error"
            )
            return (
                f"The {start} is kept: {self.steps[-1]} steps give {makes} {where} "
                f"({first:.1f}% with the {start}, {last:.1f}% at the end)."
            )
        kept = f"Step {self.best_step} of {self.steps[-1]}" if self.best_step else "The start"
        worse = (
            f"not significantly worse than the {start}"
            if self._against_average
            else f"significantly better than the {start}"
        )
        return (
            f"{kept} is kept: of the steps {worse}, it has the smallest error {where} ({best:.1f}%; {first:.1f}% with "
            f"the {start}, {last:.1f}% at the end)."
        )
