"""What is done with a fitted task, whether a model holds it or shares its backbone with other tasks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from ..errors import AdapterError, ConfigError, DataError
from ..fewshot.domains import SHARED, DomainChoice
from ..fewshot.heads import FewShotHead
from ..fewshot.prototypes import prototype_logits
from ..images.tables import Columns
from ..runtime.outputs import check_file
from .support import check_known_labels, labelled_images, require_two_classes, support_set, without_failures
from .task import FewShotTask, holds_task, save_task


Self = TypeVar("Self", bound="FewShotClassifier")


class FewShotClassifier:
    """Learns one task from its support images and classifies by it.

    `images` may be PIL images, arrays (H, W, 3), tensors (N, 3, H, W), paths, file:// URLs, open files, a folder, a
    table (CSV, parquet, DataFrame, `datasets.Dataset`) or a torch data set; one image alone is a list of one. Numbers
    in arrays and tensors are pixels, uint8 or floats from 0 to 1 as ToTensor gives them; values that are normalised
    already are refused, and go through `model.features` and `probabilities`.
    An image that cannot be read raises `DataError`, unless `failures` is given: a dictionary that takes its number
    and the reason.

    The task is replaced as a whole, so that a prediction in another thread sees the one or the other.
    """

    head: FewShotHead
    _task: FewShotTask | None = None

    def embed(
        self,
        images: Any,
        batch_size: int = 64,
        *,
        failures: dict[int, str] | None = None,
        progress: bool = False,
        domain: str | None = None,
    ) -> torch.Tensor:
        """Images to embeddings (N, D) on the model's device, without those that `failures` takes.

        Args:
            domain: whose network embeds them; by default that of the fitted task.
        """
        raise NotImplementedError

    def _choice(
        self, images: Any, names: list[Any], failures: dict[int, str] | None, domain: str | None
    ) -> tuple[torch.Tensor, list[Any], DomainChoice | None]:
        """Support images and their labels, without those that `failures` takes: embeddings by the network of the
        domain that they choose, or of the one given, and which that is."""
        raise NotImplementedError

    @property
    def domain(self) -> DomainChoice | None:
        """The domain of the fitted task, with the scores that it was chosen by; None before `fit`, and of a model
        without experts."""
        return None if self._task is None else self._task.domain

    @property
    def label_names(self) -> list[Any]:
        """The classes of the fitted task, in the order of the columns of `predict_proba`; empty before `fit`."""
        return [] if self._task is None else list(self._task.label_names)

    @property
    def classes_(self) -> np.ndarray:
        """`label_names` as scikit-learn has them.

        Raises:
            AttributeError: before `fit`, as scikit-learn expects.
        """
        if self._task is None:
            raise AttributeError("This model has no task yet, so it has no classes_. Call fit(images, labels) first.")
        return np.array(self.label_names)

    @property
    def prototypes(self) -> torch.Tensor:
        """Prototypes of the fitted task: (classes, D)."""
        return self.head.prototypes(self._fitted().statistics)

    def fit(
        self: Self,
        images: Any,
        labels: Sequence[Any] | None = None,
        *,
        failures: dict[int, str] | None = None,
        domain: str | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
    ) -> Self:
        """Learn a task from its support images: one forward pass, no tuning.

        A meta-LoRA with experts looks at them once through each of its networks, and keeps the one of the domain that
        they belong to; `model.domain` says which. Predictions cost one forward pass either way.

        Args:
            images: with `labels`, images in any form. Without, what has labels: a folder of class folders, a parquet
                or CSV file, a DataFrame, a saved or loaded data set (its train split, if it has several), a Hub data
                set id, (image, label) pairs in a list or a torch data set, or a dict of the images of each class.
            labels: names or numbers, one for each image.
            failures: takes the images that cannot be read, which are left out.
            domain (`str`, *optional*): one of `model.domains`, where the choice is not left to the images.
            image_column (`str`, *optional*): of a table; by default found by its type or a usual name.
            label_column (`str`, *optional*): the same of the labels.

        Raises:
            ConfigError: the model has no such domain.
            DataError: no images, another number of labels, one class only, or a class whose images all failed.
        """
        images, names = support_set(images, labels, Columns(image_column, label_column))
        require_two_classes(names)
        features, kept, chosen = self._choice(images, names, failures, domain)
        self._task = FewShotTask.fitted(features, kept, self.head, domain=chosen)
        return self

    def add_classes(
        self: Self,
        images: Any,
        labels: Sequence[Any] | None = None,
        *,
        failures: dict[int, str] | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
    ) -> Self:
        """Add classes to a fitted task, or images to its classes, without seeing the earlier images again.

        It takes the same images and labels as `fit`. The task keeps its domain, because only that network has embedded
        the earlier images. If the new classes are of another kind, fit all classes together.
        """
        task = self._fitted()
        images, names = support_set(images, labels, Columns(image_column, label_column))
        features = self._seen(images, failures, task.network).float()
        self._task = FewShotTask.fitted(features, without_failures(names, failures or {}), self.head, task)
        return self

    @torch.inference_mode()
    def predict_proba(
        self,
        images: Any,
        *,
        failures: dict[int, str] | None = None,
        progress: bool = False,
        batch_size: int = 64,
    ) -> torch.Tensor:
        """Class probabilities, columns in the order of `label_names`: (N, classes), float32 on the CPU.

        A transductive head (`model.head.transductive`) takes the N images as one query set: the answer for an image
        depends on the others, so images that belong together should come in one call.

        Args:
            failures: takes the images that cannot be read; their rows are NaN.
            batch_size: images of one forward pass.
        """
        task = self._fitted()
        features = self._seen(images, failures, task.network, progress, batch_size)
        return self._probabilities(task, features, failures)

    @torch.inference_mode()
    def probabilities(self, features: torch.Tensor) -> torch.Tensor:
        """Class probabilities of embeddings (N, D), as `embed` or `features` of the model gives them: (N, classes),
        float32 on the CPU.

        Raises:
            AdapterError: they are not finite.
        """
        return finite(probabilities_of(self._fitted(), features, self.head))

    @torch.inference_mode()
    def predict(
        self,
        images: Any,
        *,
        failures: dict[int, str] | None = None,
        reject_below: float | None = None,
        batch_size: int = 64,
    ) -> list[Any]:
        """The label of each image, as it was given to `fit`: the largest of `predict_proba`, the first one of equals.

        Args:
            failures: takes the images that cannot be read; their labels are None.
            reject_below (`float`, *optional*): an image less similar than that to the nearest prototype (see
                `similarity`) gets None: it may belong to none of the classes.
            batch_size: images of one forward pass.
        """
        task = self._fitted()
        features = self._seen(images, failures, task.network, batch_size=batch_size)
        labels = best_labels(task, self._probabilities(task, features, failures), failures)
        if reject_below is None:
            return labels
        near = _with_failures(self._similarity(task, features), failures).tolist()
        return [label if value >= reject_below else None for label, value in zip(labels, near, strict=True)]

    def score(self, images: Any, labels: Sequence[Any] | None = None, *, batch_size: int = 64) -> float:
        """Share of the images whose label is the right one, 0 to 1. [`evaluate_split`] gives the interval, the classes
        and the mistakes.

        Args:
            images: with `labels`, images in any form; without, what has labels, as for `fit`. Of a data set in splits
                it is the test split.
            labels: names or numbers, one for each image, as they were given to `fit`.

        Raises:
            DataError: no images, another number of labels, or a label that `fit` has not seen.
        """
        task = self._fitted()
        images, names = labelled_images(images, labels)
        check_known_labels(names, task.label_names)
        found = self.predict(images, batch_size=batch_size)
        return sum(label == name for label, name in zip(found, names, strict=True)) / len(names)

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """What scikit-learn may vary: nothing. There is nothing to tune, and weights are no setting."""
        return {}

    def set_params(self: Self, **params: Any) -> Self:
        """Raise `ConfigError` for whatever is set."""
        if params:
            raise ConfigError(f"There is no parameter {next(iter(params))!r} to set; pass it to from_pretrained.")
        return self

    def new_task(self) -> SharedTask:
        """A new, unfitted task on this model's backbone, for serving many users or many problems at once."""
        return SharedTask(self)

    def __sklearn_clone__(self) -> SharedTask:
        """What `sklearn.clone` gives: an unfitted task on the same weights, of which there is one copy in memory."""
        return self.new_task()

    def __sklearn_is_fitted__(self) -> bool:
        return self._task is not None

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import ClassifierTags, InputTags, Tags, TargetTags  # only scikit-learn asks

        targets, inputs = TargetTags(required=True), InputTags(two_d_array=False, three_d_array=True)
        return Tags("classifier", targets, classifier_tags=ClassifierTags(), input_tags=inputs)

    @torch.inference_mode()
    def similarity(self, images: Any, *, failures: dict[int, str] | None = None) -> torch.Tensor:
        """Cosine of each image's embedding to that of the nearest prototype: (N,), float32 on the CPU.

        It separates images of no class better than the probability does, which only says which class is nearer
        (docs/more.md). Which value is low depends on backbone and task; check it on your own images.

        Args:
            failures: takes the images that cannot be read; their values are NaN.
        """
        task = self._fitted()
        return _with_failures(self._similarity(task, self._seen(images, failures, task.network)), failures)

    def _similarity(self, task: FewShotTask, features: torch.Tensor) -> torch.Tensor:
        prototypes = self.head.prototypes(task.statistics).to(features.device)
        return prototype_logits(features.float(), prototypes.float()).amax(1).cpu()

    def _probabilities(
        self, task: FewShotTask, features: torch.Tensor, failures: dict[int, str] | None = None
    ) -> torch.Tensor:
        if not len(features):  # all of them failed
            return torch.full((len(failures or ()), len(task.label_names)), torch.nan)
        return _with_failures(finite(probabilities_of(task, features, self.head)), failures)

    def _seen(
        self,
        images: Any,
        failures: dict[int, str] | None,
        domain: str,
        progress: bool = False,
        batch_size: int = 64,
    ) -> torch.Tensor:
        """Embeddings of the images that can be read, by the network of a domain."""
        if failures is not None:
            failures.clear()  # of an earlier call
        return self.embed(images, batch_size=batch_size, failures=failures, progress=progress, domain=domain)

    def _fitted(self) -> FewShotTask:
        if self._task is None:
            raise DataError("This model has no task yet. Call fit(images, labels) first.")
        return self._task


def described_task(task: FewShotTask | None) -> str:
    """Classes and domain of a task in a few words, for the `repr` of what holds it."""
    if task is None:
        return "not fitted"
    names, more = [repr(name) for name in task.label_names[:5]], len(task.label_names) - 5
    shown = f"classes=[{', '.join(names)}{f', and {more} more' if more > 0 else ''}]"
    return shown if task.domain is None else f"{shown}, domain={task.domain.name!r}"


def _with_failures(values: torch.Tensor, failures: dict[int, str] | None) -> torch.Tensor:
    """(N, ...) of the images that could be read, with NaN in the places of the others."""
    if not failures:
        return values
    every = values.new_full((len(values) + len(failures), *values.shape[1:]), torch.nan)
    every[[number for number in range(len(every)) if number not in failures]] = values
    return every


def probabilities_of(task: FewShotTask, features: torch.Tensor, head: FewShotHead) -> torch.Tensor:
    """(N, D) on any device to (N, classes), float32 on the CPU."""
    return task.logits(features, head).float().softmax(-1).cpu()


def finite(probabilities: torch.Tensor) -> torch.Tensor:
    """The same. Raises `AdapterError` where they are not finite, since the first class would win."""
    if not probabilities.isfinite().all():
        raise AdapterError(
            "Class probabilities are not finite. Look at the embeddings (absurdly large weights of the base model or "
            "the adapter), and at the temperature and the parameters of the head."
        )
    return probabilities


def best_labels(task: FewShotTask, probabilities: torch.Tensor, failures: dict[int, str] | None = None) -> list[Any]:
    """The label of the largest probability of each row, None for failures."""
    labels = [task.label_names[column] for column in probabilities.argmax(-1).tolist()]
    for number in failures or ():
        labels[number] = None
    return labels


class SharedTask(FewShotClassifier):
    """One of many tasks on one model, made by `model.new_task()`: what `fit` learned, a few kilobytes, no weights.

    It answers as the model itself would after the same `fit`, and keeps its own classes whatever the model or other
    tasks learn meanwhile.
    """

    def __init__(self, model: FewShotClassifier):
        self.model = model

    def __repr__(self) -> str:
        return f"SharedTask({described_task(self._task)})"

    def new_task(self) -> SharedTask:
        """Another task on the same model."""
        return SharedTask(self.model)

    @property
    def head(self) -> FewShotHead:  # type: ignore[override]  # the model's, which alone sets it
        return self.model.head

    def embed(
        self,
        images: Any,
        batch_size: int = 64,
        *,
        failures: dict[int, str] | None = None,
        progress: bool = False,
        domain: str | None = None,
    ) -> torch.Tensor:
        own = SHARED if self._task is None else self._task.network
        return self.model.embed(images, batch_size, failures=failures, progress=progress, domain=domain or own)

    def _choice(
        self, images: Any, names: list[Any], failures: dict[int, str] | None, domain: str | None
    ) -> tuple[torch.Tensor, list[Any], DomainChoice | None]:
        return self.model._choice(images, names, failures, domain)

    def save(self, path: str | Path) -> None:
        """Write the task alone, one safetensors file, for `model.load_task`.

        Raises:
            StorageError: the path holds a file that is not a task, or it cannot be written.
        """
        task = self._fitted()
        check_file(path, holds_task, "a fitted task")
        save_task(Path(path), task)
