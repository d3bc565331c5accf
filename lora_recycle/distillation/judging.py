"""How good the student is, told by surrogate images of adapters that teach nothing: the best that was judged is kept.

Measured (examples/choose_without_images.py): by agreement with teachers, and on images of adapters that taught, a
student looks better with every step, while its accuracy on real images falls. On the classes of adapters that it never
met it looks worse where it is worse, if it learns by similarities; one that learns by episodes learns this figure too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ..errors import DataError
from ..evaluation.episodes import EpisodeSet, sample_episodes
from ..evaluation.protocol import prototype_accuracy
from ..heartbeat import beat
from .images import SurrogateImages
from .teachers import spread


if TYPE_CHECKING:
    from .batches import BatchMaker


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
    def __call__(self, embed: Callable[[torch.Tensor, torch.Tensor | None, int], torch.Tensor]) -> torch.Tensor:
        """Per cent of queries that go to the wrong class centre, by episode: float32 (E,).

        Args:
            embed: this process's share of a batch, as `Batch` has it, and how many images the batch has, to their
                features (B, D).
        """
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
        steps: how many steps were done at each judgement; the first is 0, the start.
        figures: mean error of each over all episodes, per cent.
        margins: half the 95% interval of its paired difference to the start: 1.96 standard errors over the episodes.
        rises: by how much the error of the group that fares worst is above its own at the start; negative: all fell.
        start: (E,) the start's error in each episode.
        weights: the student's trainable weights at the best, in main memory.
    """

    adapters: list[str] = dataclasses.field(default_factory=list)
    groups: list[int] = dataclasses.field(default_factory=list)
    steps: list[int] = dataclasses.field(default_factory=list)
    figures: list[float] = dataclasses.field(default_factory=list)
    margins: list[float] = dataclasses.field(default_factory=list)
    rises: list[float] = dataclasses.field(default_factory=list)
    start: torch.Tensor | None = None
    weights: list[torch.Tensor] = dataclasses.field(default_factory=list)

    def add(self, step: int, errors: torch.Tensor, parameters: list[torch.nn.Parameter]) -> None:
        """Take note of a judgement, `errors` (E,) by episode, as many of each adapter, and of the weights if it is the
        best."""
        self.start = errors.cpu() if self.start is None else self.start
        change, groups = errors.cpu() - self.start, torch.tensor(self.groups)
        of_adapters = change.view(len(self.adapters), -1).mean(1)
        self.steps.append(step)
        self.figures.append(errors.mean().item())
        self.margins.append(1.96 * change.std().item() / math.sqrt(len(errors)))
        self.rises.append(torch.stack([of_adapters[groups == g].mean() for g in groups.unique()]).max().item())
        if self._best == len(self.steps) - 1:
            self.weights = [parameter.detach().to("cpu", copy=True) for parameter in parameters]

    @property
    def _best(self) -> int:
        """The lowest of those that are surely below the start, and in no group above it, of equal ones the first; else
        the start.

        Of many judgements some are below it by chance; and of the groups of a mixed pool small ones gain most easily
        at the expense of the largest, of which most adapters are.
        """
        surely = [
            i
            for i, figure in enumerate(self.figures)
            if self.figures[0] - figure > self.margins[i] and self.rises[i] <= 0
        ]
        return min(surely, key=self.figures.__getitem__, default=0)

    @property
    def best_step(self) -> int | None:
        """Steps after which the student was best; None where nothing was judged."""
        return self.steps[self._best] if self.steps else None

    @property
    def in_vain(self) -> int:
        """How many judgements there were since the best."""
        return len(self.steps) - 1 - self._best if self.steps else 0

    @torch.no_grad()
    def put_on_best(self, parameters: list[torch.nn.Parameter]) -> None:
        """Set the student's trainable weights to those of the best judgement, bit for bit."""
        if self.steps:
            for parameter, weight in zip(parameters, self.weights, strict=True):
                parameter.copy_(weight)

    def to_dict(self) -> dict[str, Any] | None:
        """For the sidecar, JSON; None where nothing was judged."""
        if not self.steps:
            return None
        names = ("adapters", "groups", "steps", "figures", "margins", "rises")
        return {"who": self.who} | {name: list(getattr(self, name)) for name in names} | {"best_step": self.best_step}

    @property
    def who(self) -> str:
        """By whom it was judged."""
        return f"{len(self.adapters)} adapter{'s' * (len(self.adapters) != 1)} that taught nothing"

    def verdict(self) -> str:
        """What is kept and why, in a sentence."""
        if not self.steps:
            return (
                f"Nothing was judged, and the last step is kept: judging takes {SMALLEST_GROUP} adapters that are "
                "alike, with 2 images of a class. Add adapters, or set `held_out` to 0."
            )
        first, best, last = self.figures[0], self.figures[self._best], self.figures[-1]
        where = f"on the classes of {self.who}"
        if self.best_step == 0:
            group = ", in no group of them a larger one," if len(set(self.groups)) > 1 else ""
            return (
                f"The start is kept: in {self.steps[-1]} steps the student made no surely smaller error{group} "
                f"{where} ({first:.1f}% at the start, {last:.1f}% at the end)."
            )
        return (
            f"Step {self.best_step} of {self.steps[-1]} is kept: it makes the smallest error {where} "
            f"({best:.1f}%, {first:.1f}% at the start, {last:.1f}% at the end)."
        )
