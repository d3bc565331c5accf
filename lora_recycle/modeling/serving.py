"""Many tasks on one model: images of different tasks in one forward pass for each domain among them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..backbones.backbone import Backbone
from ..errors import DataError
from ..fewshot.heads import FewShotHead
from ..runtime.terminal import counted
from .classifier import FewShotClassifier, SharedTask, finite
from .preprocessing import as_batch, pixel_batches
from .task import FewShotTask, load_task


class TaskServer(FewShotClassifier):
    """A model that serves many tasks on one backbone."""

    backbone: Backbone

    @property
    def domains(self) -> list[str]:
        """As of [`MetaLoRAForFewShotClassification`]."""
        raise NotImplementedError

    def _embeddings(self, pixel_values: torch.Tensor, domain: str | None = None) -> torch.Tensor:
        raise NotImplementedError

    def load_task(self, path: str | Path) -> SharedTask:
        """Load a task that `SharedTask.save` wrote. The file is not trusted.

        Raises:
            AdapterError: it is damaged, or fits another backbone.
            DataError: there is no such file, or another kind of head fitted it.
        """
        task = SharedTask(self)
        task._task = load_task(Path(path), self.head, self.backbone.hidden_size, self.domains)
        if task._task is None:
            raise DataError(f"{path}: there is no fitted task here that the head {self.head.name} can use.")
        return task

    def predict_tasks(self, images: Any, tasks: Sequence[FewShotClassifier], batch_size: int = 64) -> list[Any]:
        """The label of each image by the task of its place: images of many tasks in one forward pass, or in one for
        each domain that there is among the tasks.

        Args:
            images: N images in any form that `fit` takes.
            tasks: N tasks, `new_task()` of this model each; the same one may come again.

        Raises:
            DataError: another number of tasks, or one that is not fitted or another model's.
        """
        return [task.label_names[int(row.argmax())] for task, row in answer_tasks(self, images, tasks, batch_size)]

    def predict_proba_tasks(
        self, images: Any, tasks: Sequence[FewShotClassifier], batch_size: int = 64
    ) -> list[torch.Tensor]:
        """Class probabilities of each image by the task of its place, (classes of the task,) each, on the CPU."""
        return [row for _, row in answer_tasks(self, images, tasks, batch_size)]


def answer_tasks(
    model: TaskServer, images: Any, tasks: Sequence[FewShotClassifier], batch_size: int
) -> list[tuple[FewShotTask, torch.Tensor]]:
    """For each image the task of its place as it is now, and the probabilities of that task's classes, on the CPU.

    Raises:
        DataError: another number of tasks than images, or a task that is not fitted or is another model's.
    """
    images = as_batch(images)
    if len(images) != len(tasks):
        found = f"{counted(len(images), 'image')}, but {counted(len(tasks), 'task')}"
        raise DataError(f"{found}: each image needs the task it belongs to.")
    if any(getattr(task, "model", task) is not model for task in tasks):
        raise DataError("A task belongs to another model. Make tasks with new_task() of the model that is asked.")
    fitted = [task._fitted() for task in tasks]  # each as it is now, whatever is fitted meanwhile
    domains = [task.network for task in fitted]
    if len(set(domains)) == 1:
        features = model.embed(images, batch_size, domain=domains[0])
    else:
        features = _embed_by_domain(model, images, domains, batch_size)
    return mixed_probabilities(fitted, features, model.head)


@torch.inference_mode()
def _embed_by_domain(model: TaskServer, images: Any, domains: list[str], batch_size: int) -> torch.Tensor:
    """Embeddings (N, D) of N images by the network of each one's domain."""
    parts, start = [], 0
    for pixel_values in pixel_batches(images, model.backbone, batch_size):
        own = domains[start : start + len(pixel_values)]
        start += len(own)
        embedded = pixel_values.new_empty(len(own), model.backbone.hidden_size, dtype=model.backbone.dtype)
        for name in set(own):
            rows = [row for row, domain in enumerate(own) if domain == name]
            embedded[rows] = model._embeddings(pixel_values[rows], name)
        parts.append(embedded)
    return torch.cat(parts)


@torch.inference_mode()
def mixed_probabilities(
    tasks: Sequence[FewShotTask], features: torch.Tensor, head: FewShotHead
) -> list[tuple[FewShotTask, torch.Tensor]]:
    """For each query of (N, D), which belongs to the task of its place: that task, and (classes,)."""
    rows: dict[int, list[int]] = {}
    for number, task in enumerate(tasks):
        rows.setdefault(id(task), []).append(number)
    fitted = [tasks[own[0]] for own in rows.values()]
    order, sizes = [row for own in rows.values() for row in own], [len(own) for own in rows.values()]
    parts = features[order].split(sizes)
    scores = [task.logits(part, head).float().softmax(-1) for task, part in zip(fitted, parts, strict=True)]
    # one copy from the device, not one for each task
    flat = finite(torch.cat([score.flatten() for score in scores]).cpu())
    probabilities = [
        row
        for score, part in zip(scores, flat.split([s.numel() for s in scores]), strict=True)
        for row in part.view_as(score)
    ]
    known = [task for task, size in zip(fitted, sizes, strict=True) for _ in range(size)]
    places = sorted(range(len(order)), key=order.__getitem__)
    return [(known[place], probabilities[place]) for place in places]
