"""MetaLoRAForFewShotClassification: the model that classifies a new task from its support images, untuned."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from peft import PeftModel, set_peft_model_state_dict
from torch import nn
from transformers.utils import ModelOutput

from ..adapters.load import load_adapter
from ..adapters.peft_wrap import Layers, wrap
from ..adapters.pull import pull_adapter
from ..adapters.sources import named_base
from ..backbones.backbone import Backbone, check_embeddings
from ..errors import ConfigError, DataError
from ..fewshot.heads import make_head
from ..hub.embedded import resolve_meta_lora
from ..hub.repo_files import SIDECAR_FILE
from .classifier import FewShotClassifier, SharedTask, mixed_probabilities
from .merge_layers import merge_layers
from .preprocessing import as_batch, pixel_batches, to_pixel_values
from .publishing import push_adapter_folder
from .serialization import write_meta_lora
from .sidecar import read_picture, read_sidecar, task_file
from .support import require_two_classes, support_set
from .task import FewShotTask, load_task


if TYPE_CHECKING:
    from ..finetuning.base import TaskNetwork
    from ..finetuning.config import TaskTuningConfig


@dataclasses.dataclass
class FewShotOutput(ModelOutput):
    """`loss` (scalar, where query labels are given), `logits` (Q, ways), `prototypes` (ways, D)."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    prototypes: torch.Tensor | None = None


class MetaLoRAForFewShotClassification(FewShotClassifier, nn.Module):
    """A frozen ViT that wears a meta-LoRA and classifies by a few-shot head, prototypes by default.

    `fit`, `predict`, `predict_proba` and `add_classes` are those of [`FewShotClassifier`].

    Args:
        backbone ([`Backbone`]): its linear layers are wrapped by PEFT in place.
        peft_model: the PEFT model around `backbone.model`.
        settings (`dict`, *optional*): the sidecar: head, metric, temperature, head parameters, sources, results.

    Raises:
        ConfigError: there is no head of the name in `settings`, or it does not take the parameters there.
    """

    def __init__(self, backbone: Backbone, peft_model: PeftModel, settings: dict[str, Any] | None = None):
        super().__init__()
        self.backbone, self.peft_model, self.settings = backbone, peft_model, dict(settings or {})
        self.head = make_head(self.settings.get("head", "prototypes"), self.settings)
        #: PNG of some of the surrogate images that it learned from, where they are at hand
        self.picture: bytes | None = None
        self._task: FewShotTask | None = None
        #: PEFT's layers after `merge`, by the module that each stood around
        self._merged: Layers = {}
        #: after `tune`, what takes the adapter back
        self._untuned: TaskNetwork | None = None
        self.eval()

    @classmethod
    def from_pretrained(
        cls,
        repo_or_path: str | Path,
        *,
        head: str | None = None,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        base_model: str | Path | None = None,
        base_revision: str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> MetaLoRAForFewShotClassification:
        """Load a meta-LoRA from a folder or a repo id; `demo` is the embedded one.

        The base model is the one that the adapter names unless `base_model` is given. A fitted task that was saved
        with it comes back fitted, unless `head` needs other statistics of the support images, which a warning tells.

        Args:
            head (`str`, *optional*): one of `fewshot.heads.HEADS` by name; by default the one it was saved with.

        Raises:
            AdapterError: files are missing or damaged, or do not fit the base model.
            ConfigError: there is no head of this name.
        """
        if head is not None:
            make_head(head, {})  # an unknown name is told before anything is fetched
        hub: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        info = pull_adapter(resolve_meta_lora(repo_or_path), revision=revision, **hub)
        if base_model is None and base_revision is None:
            base_revision = info.base_revision
        base = named_base(info) if base_model is None else base_model
        backbone = Backbone.from_pretrained(base, revision=base_revision, device=device, dtype=dtype, **hub)
        loaded = load_adapter(info, backbone.model)
        loaded.peft_config.base_model_name_or_path = str(base)
        peft_model = wrap(backbone.model, loaded.peft_config)
        set_peft_model_state_dict(peft_model, loaded.state_dict)
        peft_model.to(device=backbone.device, dtype=backbone.dtype)
        settings = read_sidecar(info.path / SIDECAR_FILE, head)
        model = cls(backbone, peft_model, settings if head is None else {**settings, "head": head})
        path = task_file(info, model.settings, hub)
        model._task = None if path is None else load_task(path, model.head, backbone.hidden_size)
        model.picture = read_picture(info)
        return model

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    def merge(self) -> MetaLoRAForFewShotClassification:
        """Fold the meta-LoRA into the backbone's weights, for use: a forward then costs what the bare backbone's does.

        Answers stay the same up to rounding. Fitting and saving go on as before (the adapter is kept beside the
        weights and saved as it is), training does not. There is no way back but to load the model again.

        Raises:
            AdapterError: the adapter is of a type that is no change of weights; it stays as it was.
        """
        self._merged = self._merged or merge_layers(self.backbone)
        self._untuned = None  # a tuned adapter is the model's own from here on
        return self

    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Normalised images (B, 3, H, W) to embeddings (B, D)."""
        return self.backbone.features(pixel_values.to(self.device))

    def _embeddings(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`features`, checked to be finite."""
        features = self.features(pixel_values)
        check_embeddings(features, pixel_values, self.backbone.name)
        return features

    def forward(
        self,
        support_pixel_values: torch.Tensor,
        support_labels: torch.Tensor,
        query_pixel_values: torch.Tensor,
        query_labels: torch.Tensor | None = None,
    ) -> FewShotOutput:
        """Classify one task in a single forward pass.

        Args:
            support_pixel_values: (S, 3, H, W), normalised.
            support_labels: int64 (S,), values 0 to ways - 1, each present.
            query_pixel_values: (Q, 3, H, W). A transductive head takes them as one set.
            query_labels: int64 (Q,); with them the output has a loss.

        Raises:
            AdapterError: the embeddings are not finite.
            DataError: labels that do not number 0 to ways - 1, one class only, or fewer labels than images; or the
                images hold NaN or infinity.
        """
        support_labels = _check_support(support_pixel_values, support_labels).to(self.device)
        ways = int(support_labels.max()) + 1
        features = self._embeddings(torch.cat([support_pixel_values, query_pixel_values]))
        support, query = features.split([len(support_pixel_values), len(query_pixel_values)])
        statistics = self.head.statistics(support, support_labels, ways)
        logits = self.head.logits(query, self.head.prepare(statistics))
        loss = None if query_labels is None else F.cross_entropy(logits.float(), query_labels.to(self.device))
        return FewShotOutput(loss=loss, logits=logits, prototypes=self.head.prototypes(statistics))

    def preprocess(self, images: Any) -> torch.Tensor:
        """What `features` and `forward` take: images in any form that `fit` takes to normalised (N, 3, S, S)."""
        return to_pixel_values(as_batch(images), self.backbone)

    @torch.inference_mode()
    def embed(
        self, images: Any, batch_size: int = 64, *, failures: dict[int, str] | None = None, progress: bool = False
    ) -> torch.Tensor:
        """Images in any form that `fit` takes to embeddings (N, D) on the model's device.

        Files are decoded by threads, two batches at a time, so that their number does not matter to memory.

        Args:
            failures: takes the number and the error of each image that cannot be read, which is left out.

        Raises:
            AdapterError: the embeddings are not finite.
        """
        batches = pixel_batches(as_batch(images), self.backbone, batch_size, failures, progress)
        parts = [self._embeddings(pixel_values) for pixel_values in batches]
        if not parts:  # all of them failed
            return torch.zeros(0, self.backbone.hidden_size, device=self.device)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def fit(
        self, images: Any, labels: Sequence[Any] | None = None, *, failures: dict[int, str] | None = None
    ) -> MetaLoRAForFewShotClassification:
        self._untune()
        return super().fit(images, labels, failures=failures)

    fit.__doc__ = FewShotClassifier.fit.__doc__

    def tune(
        self, images: Any, labels: Sequence[Any] | None = None, config: TaskTuningConfig | None = None
    ) -> MetaLoRAForFewShotClassification:
        """Learn a task as `fit` does, then tune the meta-LoRA on its support images; the prototypes follow.

        By default an image that is alone in its class teaches nothing: with one image of each class this is `fit`.
        Else it takes a second or more where `fit` takes one forward pass; docs/tuning.md says what it gains. It begins
        with the meta-LoRA as it was loaded, to which `fit` and the next `tune` return; saving writes the tuned one.
        Other threads must not predict meanwhile.

        Args:
            images: as for `fit`.
            labels: as for `fit`.
            config ([`TaskTuningConfig`], *optional*): how; by default `modeling.tuning.default_config`.

        Raises:
            ConfigError: the model is merged, or its head does not score by prototypes.
            DataError: as `fit`.
        """
        from .tuning import default_config, tuned_task

        images, names = support_set(images, labels)
        require_two_classes(names)
        config = config or default_config(self.head)
        self._task = tuned_task(self.tuning_network(config), self.head, images, names, config)
        return self

    def tuning_network(self, config: TaskTuningConfig) -> TaskNetwork:
        """The model as a network whose adapter learns in the last layers, taken back to the adapter as it was loaded.

        Raises:
            ConfigError: the adapter is folded into the weights, the head does not score by prototypes, or it does
                so by another metric than `config`.
        """
        from .tuning import adapter_network, check_head

        if self._merged:
            raise ConfigError(
                "A merged model cannot be tuned: its adapter is in the weights. Load it again, tune, merge."
            )
        check_head(self.head, config)
        self._untune()
        self._untuned = adapter_network(self.backbone, config)
        return self._untuned

    def _untune(self) -> None:
        """Take the adapter back to how it was loaded."""
        if self._untuned is not None:
            self._untuned.reset()
            self._untuned = None

    def new_task(self) -> SharedTask:
        """A task of its own on this model's backbone, to be fitted: what many users or many problems need at once."""
        return SharedTask(self)

    def load_task(self, path: str | Path) -> SharedTask:
        """A task that `SharedTask.save` wrote, of which nothing is trusted.

        Raises:
            AdapterError: it is damaged, or fits another backbone.
            DataError: there is no such file, or another kind of head fitted it.
        """
        task = SharedTask(self)
        task._task = load_task(Path(path), self.head, self.backbone.hidden_size)
        if task._task is None:
            raise DataError(f"{path}: there is no fitted task here that the head {self.head.name} can use.")
        return task

    def predict_tasks(self, images: Any, tasks: Sequence[FewShotClassifier], batch_size: int = 64) -> list[Any]:
        """The label of each image by the task of its place: images of many tasks in one forward pass.

        Args:
            images: N images in any form that `fit` takes.
            tasks: N tasks, `new_task()` of this model each; the same one may come again.

        Raises:
            DataError: another number of tasks, or one that is not fitted or another model's.
        """
        return [task.label_names[int(row.argmax())] for task, row in self._mixed(images, tasks, batch_size)]

    def predict_proba_tasks(
        self, images: Any, tasks: Sequence[FewShotClassifier], batch_size: int = 64
    ) -> list[torch.Tensor]:
        """Class probabilities of each image by the task of its place, (classes of the task,) each, on the CPU."""
        return [row for _, row in self._mixed(images, tasks, batch_size)]

    def _mixed(
        self, images: Any, tasks: Sequence[FewShotClassifier], batch_size: int
    ) -> list[tuple[FewShotTask, torch.Tensor]]:
        images = as_batch(images)
        if len(images) != len(tasks):
            raise DataError(f"{len(images)} images, but {len(tasks)} tasks: each image needs the task it belongs to.")
        if any(getattr(task, "model", task) is not self for task in tasks):
            raise DataError("A task belongs to another model. Make tasks with new_task() of the model that is asked.")
        return mixed_probabilities(tasks, self.embed(images, batch_size))

    def save_pretrained(self, save_directory: str | Path, *, bits: int | None = None) -> None:
        """Write a plain PEFT adapter with our sidecar, and the fitted task where there is one.

        Args:
            bits (`int`, *optional*): for each weight. 16 (bfloat16) is a plain adapter too; 8, 4, 2 and 1 are codes
                that only this library reads (`hub.codes`). By default weights are saved as they are.

        Raises:
            ConfigError: another number of bits.
            StorageError: the folder holds something else than a meta-LoRA, or cannot be written.
        """
        write_meta_lora(self, save_directory, bits)

    def merge_and_save(self, save_directory: str | Path) -> None:
        """Write the network with the meta-LoRA in its weights as a plain transformers checkpoint, image processor
        included, as [`export`] does with `format="transformers"`. The model itself stays as it is.

        Raises:
            AdapterError: the adapter is no change of weights.
        """
        from .export import export

        export(self, save_directory, "transformers")

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        bits: int | None = None,
    ) -> str:
        """Publish what `save_pretrained` writes, with a card, in one commit, and return the URL.

        Args:
            repo_id (`str`): made if it is new.
            private (`bool`, *optional*): whether a new repo is.
            revision (`str`, *optional*): branch, made from main if it is new.
            create_pr (`bool`, *optional*, defaults to `False`): open a pull request and return its URL.
            bits (`int`, *optional*): for each weight, as in `save_pretrained`.

        Raises:
            PushError: the base model is a local folder, or the push failed; then nothing of it is in the repo.
        """
        options: dict[str, Any] = {"private": private, "token": token, "revision": revision, "create_pr": create_pr}
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, bits=bits)
            return push_adapter_folder(folder, repo_id, commit_message=commit_message, **options)


def _check_support(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    labels = torch.as_tensor(labels)
    if len(labels) != len(images) or not len(labels):
        raise DataError(f"{len(images)} support images, but {len(labels)} labels.")
    present = labels.unique()
    require_two_classes(present.tolist())
    if not torch.equal(present.cpu(), torch.arange(len(present))):
        raise DataError(f"Support labels must number the classes 0 to {len(present) - 1}, got {present.tolist()}.")
    return labels.long()
