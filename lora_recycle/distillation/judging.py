"""How good the student is, told by surrogate images that no step trains on: the best that was judged is kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from ..heartbeat import beat
from ..relations import cosine_similarity, relational_divergence_to
from .batches import BatchMaker
from .images import SurrogateImages
from .teachers import FEWEST, TeacherGroup, spread


#: Images that a student is judged on, at most, and those that are forwarded at a time.
MOST, _BATCH = 512, 128
#: A class of fewer images is learnt as a whole.
_SMALLEST_CLASS = 3


def disagreement(student: torch.Tensor, similarity: torch.Tensor, scale: float) -> torch.Tensor:
    """The figure that students are judged by, on the images of one group; less is better.

    The relational loss, but of all images at once.

    Args:
        student: features (n, D).
        similarity: (n, n), the mean cosine similarity over the group's teachers.
    """
    return relational_divergence_to(student, similarity, scale)


def hold_back(
    images: SurrogateImages, groups: list[TeacherGroup], share: float, seed: int
) -> tuple[list[TeacherGroup], torch.Tensor]:
    """The images to judge on, by group, and for each image whether it is one of them: bool (N,).

    They are `share` of each class of each adapter, at least one of three and none of fewer; at most `MOST` in all,
    spread evenly over the groups and their adapters. Groups with too few have none.
    """
    candidates = torch.zeros(len(images), dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    for number, shard in enumerate(images.shards if share else ()):
        labels = shard.labels
        for c in labels.unique().tolist():
            own = images.of_shard(number)[labels == c]
            if len(own) >= _SMALLEST_CLASS:
                chosen = torch.randperm(len(own), generator=generator)[: max(1, round(share * len(own)))]
                candidates[own[chosen]] = True
    most = max(FEWEST, MOST // max(1, len(groups)))
    parts = [group.only(spread(candidates[group.images].nonzero().flatten(), most)) for group in groups]
    parts, held_back = [part for part in parts if len(part.images) >= FEWEST], torch.zeros_like(candidates)
    for part in parts:
        held_back[part.images] = True
    return parts, held_back


class Judge:
    """Judges a student by held-back images, read from disk again each time.

    Always the same images in the same batches: equal weights get an equal figure, whenever and, but for rounding, on
    however many processes.

    Args:
        groups: from [`hold_back`].
        make_batch: reads this process's share of images.
        scale: `DistillationConfig.similarity_scale`.
    """

    def __init__(self, groups: list[TeacherGroup], make_batch: BatchMaker, scale: float):
        self._make_batch, self._scale = make_batch, scale
        self._sizes = [len(group.images) for group in groups]
        self._images = torch.cat([group.images for group in groups])
        everything = (group.read(torch.arange(len(group.images))) for group in groups)
        self._similarities = [cosine_similarity(features.float()) for features in everything]

    @torch.no_grad()
    def __call__(self, embed: Callable[[torch.Tensor, torch.Tensor | None, int], torch.Tensor]) -> float:
        """The mean over the groups of [`disagreement`].

        Args:
            embed: this process's share of a batch, as `Batch` has it, and how many images the batch has, to their
                features (B, D).
        """
        features = []
        for index in self._images.split(_BATCH):
            beat("judging")
            features.append(embed(*self._make_batch.own_inputs(index), len(index)))
        parts = torch.cat(features).split(self._sizes)
        values = [disagreement(*pair, self._scale) for pair in zip(parts, self._similarities, strict=True)]
        return torch.stack(values).mean().item()


@dataclasses.dataclass
class Judgements:
    """What was judged so far.

    Attributes:
        images: how many images were held back to judge on; 0 where nothing is judged.
        steps: how many steps were done at each judgement; the first is 0, the start.
        figures: what each said; less is better.
        weights: the student's trainable weights at the best, in main memory.
    """

    images: int = 0
    steps: list[int] = dataclasses.field(default_factory=list)
    figures: list[float] = dataclasses.field(default_factory=list)
    weights: list[torch.Tensor] = dataclasses.field(default_factory=list)

    def add(self, step: int, figure: float, parameters: list[torch.nn.Parameter]) -> None:
        self.steps.append(step)
        self.figures.append(figure)
        if self._best == len(self.steps) - 1:
            self.weights = [parameter.detach().to("cpu", copy=True) for parameter in parameters]

    @property
    def _best(self) -> int:
        return min(range(len(self.figures)), key=self.figures.__getitem__)  # of equal ones the first

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
        return {
            "images": self.images,
            "steps": list(self.steps),
            "figures": list(self.figures),
            "best_step": self.best_step,
        }

    def verdict(self) -> str:
        """What is kept and why, in a sentence."""
        if not self.steps:
            return (
                f"Nothing was judged, and the last step is kept: judging takes {FEWEST} surrogate images of a group "
                f"of adapters, of classes that have {_SMALLEST_CLASS}. Invert with more `images_per_class`, or set "
                "`held_out` to 0."
            )
        first, best, last = self.figures[0], self.figures[self._best], self.figures[-1]
        where = f"on {self.images} surrogate images that were held back"
        if self.best_step == 0:
            return (
                f"The start is kept: in {self.steps[-1]} steps the student came no closer to the teachers {where} "
                f"(disagreement {first:.4f} at the start, {last:.4f} at the end)."
            )
        return (
            f"Step {self.best_step} of {self.steps[-1]} is kept: it is closest to the teachers {where} "
            f"(disagreement {best:.4f}, {first:.4f} at the start, {last:.4f} at the end)."
        )
