"""Which weights a training keeps: the candidates, their errors on held-out adapters, and the rule."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import torch
from accelerate.utils import broadcast

from ..pool.pool import AdapterPool
from .config import AVERAGES, DistillationConfig
from .held_out import SMALLEST_GROUP, HeldOutEpisodes
from .parallel import ParallelStudent
from .student import Student


class Candidate(NamedTuple):
    """Weights that may be kept: the pool's average, the initialisation, or a mix of it and what was learned."""

    kind: str
    #: share of the learned change in a mix; the initialisation has the rest
    alpha: float = 0.0

    @classmethod
    def from_list(cls, weights: list[float]) -> Candidate:
        """From `to_list`, as sidecars and checkpoints hold it."""
        learned, init = weights
        return mix(learned) if learned or init else AVERAGE

    def to_list(self) -> list[float]:
        """Weights of the learned change and of the initialisation; both are 0 for the pool's average."""
        return [0.0, 0.0] if self == AVERAGE else [self.alpha, 1 - self.alpha]


AVERAGE, INIT = Candidate("average"), Candidate("init")


def mix(alpha: float) -> Candidate:
    """`alpha` of the learned change beside `1 - alpha` of the initialisation; all of it with 1."""
    return Candidate("mix", alpha) if alpha else INIT


@dataclasses.dataclass
class CheckpointSelection:
    """The candidates that were evaluated so far, and the weights of the best.

    Attributes:
        adapters: names of those held out; empty where nothing is evaluated.
        groups: of like adapters, the number of each one's.
        steps: how many steps were done at each evaluation; the first is of the start.
        candidates: what was evaluated.
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
    candidates: list[Candidate] = dataclasses.field(default_factory=list)
    figures: list[float] = dataclasses.field(default_factory=list)
    margins: list[float] = dataclasses.field(default_factory=list)
    rises: list[float] = dataclasses.field(default_factory=list)
    first: torch.Tensor | None = None
    weights: list[torch.Tensor] = dataclasses.field(default_factory=list)

    def add(self, step: int, candidate: Candidate, errors: torch.Tensor, parameters: list[torch.nn.Parameter]) -> None:
        """Record an evaluation, `errors` (E,) by episode as many of each adapter, and the weights if it is best."""
        errors = errors.cpu()
        self.first = errors if self.first is None else self.first
        change = errors - self.first
        groups = torch.tensor(self.groups).repeat_interleave(len(errors) // len(self.groups))
        self.steps.append(step)
        self.candidates.append(candidate)
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
        is learned must be significantly below it.
        """
        sound = [i for i, rise in enumerate(self.rises) if rise <= 0]
        learned = [i for i in sound if self.steps[i] > 0]
        if not self._against_average:
            learned = [i for i in learned if self.figures[0] - self.figures[i] > self.margins[i]]
        starts = [i for i in sound if self.steps[i] == 0]
        return min(learned or starts, key=self.figures.__getitem__, default=0)

    @property
    def _against_average(self) -> bool:
        return self.candidates[:1] == [AVERAGE]

    @property
    def best_step(self) -> int | None:
        """Steps after which the student was best; None where nothing was evaluated."""
        return self.steps[self._best] if self.steps else None

    @property
    def evaluations_since_best(self) -> int:
        """How many evaluations there were after later steps than the best."""
        return sum(step > self.steps[self._best] for step in self.steps)

    @torch.no_grad()
    def restore_best(self, parameters: list[torch.nn.Parameter]) -> Candidate | None:
        """Set the student's trainable weights to those of the best evaluation, bit for bit. Returns which candidate
        that was, None where nothing was evaluated."""
        if not self.steps:
            return None
        for parameter, weight in zip(parameters, self.weights, strict=True):
            parameter.copy_(weight)
        return self.candidates[self._best]

    def state(self) -> dict[str, list]:
        """The evaluations, JSON, under the keys that sidecars and checkpoints have."""
        return {
            "steps": self.steps,
            "blends": [candidate.to_list() for candidate in self.candidates],
            "figures": self.figures,
            "margins": self.margins,
            "rises": self.rises,
        }

    def load_state(self, state: dict[str, list]) -> None:
        """Take over what `state` gave. Raises `KeyError` where a part of it is missing."""
        self.candidates = [Candidate.from_list(weights) for weights in state["blends"]]
        self.steps, self.figures = list(state["steps"]), list(state["figures"])
        self.margins, self.rises = list(state["margins"]), list(state["rises"])

    def to_dict(self) -> dict[str, Any] | None:
        """For the sidecar, JSON; None where nothing was evaluated."""
        if not self.steps:
            return None
        best = {"best_step": self.best_step, "best_blend": self.candidates[self._best].to_list()}
        return {"who": self.evidence, "adapters": self.adapters, "groups": self.groups} | self.state() | best

    @property
    def evidence(self) -> str:
        """What it was evaluated on."""
        return f"{len(self.adapters)} validation adapter{'s' * (len(self.adapters) != 1)}"

    def verdict(self) -> str:
        """What is kept and why, in a sentence."""
        if not self.steps:
            return (
                f"No validation was possible, so the last step is kept: it needs {SMALLEST_GROUP} similar adapters "
                "with 2 images per class. Add adapters, or set `validation_fraction` to 0."
            )
        first, best, last = self.figures[0], self.figures[self._best], self.figures[-1]
        where, start = f"on the classes of {self.evidence}", "average" if self._against_average else "start"
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
        worse = "not significantly worse" if self._against_average else "significantly better"
        return (
            f"{kept} is kept: of the steps {worse} than the {start}, it has the smallest error {where} "
            f"({best:.1f}%; {first:.1f}% with the {start}, {last:.1f}% at the end)."
        )


@dataclasses.dataclass
class StudentCandidates:
    """Evaluates what may be kept of a student, and records it in a selection."""

    student: Student
    pool: AdapterPool
    config: DistillationConfig
    parallel: ParallelStudent
    held_out: HeldOutEpisodes
    selection: CheckpointSelection

    def evaluate(self, step: int) -> None:
        """The student after `step` steps as it would be kept; before the first one the pool's average as well."""
        if step == 0 and self.has_average:
            with self.pool.folded() as average:
                errors = self.held_out(functools.partial(self.parallel.embed, other=average))
            self._record(step, AVERAGE, errors)
        candidate = INIT if self.config.mixes and step == 0 else learned(self.config)
        with self.student.mixed(candidate.alpha):
            errors = self.held_out(self.parallel.embed)
        self._record(step, candidate, errors)

    @property
    def has_average(self) -> bool:
        """Whether the pool's average is not itself the start; tokens of `first_layer` are of the start alone."""
        scaled = self.config.init in AVERAGES and self.config.init != "average"
        return scaled and self.config.first_layer == 0 and len(self.pool.groups()) > 1

    def _record(self, step: int, candidate: Candidate, errors: torch.Tensor) -> None:
        errors = broadcast(errors.to(self.parallel.accelerator.device))
        self.selection.add(step, candidate, errors, self.student.trainable())


def learned(config: DistillationConfig) -> Candidate:
    """What a recipe keeps of a student that has learned."""
    return mix(config.share if config.mixes else 1.0)


def keep_best(student: Student, pool: AdapterPool, config: DistillationConfig, selection: CheckpointSelection) -> None:
    """Set the student to the best candidate; where none was evaluated, to the last step, mixed as the recipe says."""
    best = selection.restore_best(student.trainable()) or learned(config)
    if best == AVERAGE:
        student.start_from_average(pool)
    else:
        student.mix(best.alpha)
