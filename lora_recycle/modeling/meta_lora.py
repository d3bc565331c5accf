"""MetaLoRAForFewShotClassification: the model that classifies a new task from its support images, untuned."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from peft import PeftModel, set_peft_model_state_dict
from torch import nn
from transformers.utils import ModelOutput

from ..adapters.experts import read_domains
from ..adapters.load import load_adapter
from ..adapters.peft_wrap import Layers, wrap
from ..adapters.pull import pull_adapter
from ..adapters.sources import named_base
from ..backbones.backbone import Backbone, check_embeddings
from ..errors import ConfigError, DataError
from ..fewshot.domains import SHARED, DomainChoice
from ..fewshot.heads import make_head
from ..hub.download import HubOptions
from ..hub.embedded import resolve_meta_lora
from ..hub.repo_files import SIDECAR_FILE
from .classifier import FewShotClassifier, SharedTask
from .domains import FROZEN, DomainNetworks
from .merge_layers import merge_layers
from .preprocessing import as_batch, pixel_batches, to_pixel_values
from .publishing import push_adapter_folder
from .serialization import write_meta_lora
from .serving import answer_tasks
from .sidecar import read_picture, read_sidecar, task_file
from .support import require_two_classes, support_set, without_failures
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

    One of a pool of several domains has experts, networks of their own on the same weights. `fit` chooses one by the
    support images, or the shared network; the fitted task, and all that is done with it, uses that one.

    Args:
        backbone ([`Backbone`]): of the shared network; its linear layers are wrapped by PEFT in place.
        peft_model: the PEFT model around `backbone.model`.
        settings (`dict`, *optional*): the sidecar: head, metric, temperature, head parameters, sources, results.
        domain_networks ([`DomainNetworks`], *optional*): the experts.

    Raises:
        ConfigError: there is no head of the name in `settings`, or it does not take the parameters there.
    """

    def __init__(
        self,
        backbone: Backbone,
        peft_model: PeftModel,
        settings: dict[str, Any] | None = None,
        domain_networks: DomainNetworks | None = None,
    ):
        super().__init__()
        self.backbone, self.peft_model, self.settings = backbone, peft_model, dict(settings or {})
        self.domain_networks = domain_networks
        self.head = make_head(self.settings.get("head", "prototypes"), self.settings)
        #: PNG of some of the surrogate images that it learned from, where they are at hand
        self.picture: bytes | None = None
        self._task: FewShotTask | None = None
        #: PEFT's layers after `merge`, by the module that each stood around
        self._merged: Layers = {}
        #: whose network that was
        self._merged_domain = SHARED
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
            make_head(head, {})  # an unknown name is an error before anything is fetched
        hub = HubOptions(token=token, cache_dir=cache_dir, local_files_only=local_files_only)
        info = pull_adapter(resolve_meta_lora(repo_or_path), revision=revision, **hub)
        if base_model is None and base_revision is None:
            base_revision = info.base_revision
        base = named_base(info) if base_model is None else base_model
        settings = read_sidecar(info.path / SIDECAR_FILE, head)
        entries = read_domains(settings, info.where)
        backbone = Backbone.from_pretrained(base, revision=base_revision, device=device, dtype=dtype, **hub)
        loaded = load_adapter(info, backbone.model)
        experts = None if entries is None else DomainNetworks.from_entries(info, entries, backbone, hub)
        loaded.peft_config.base_model_name_or_path = str(base)
        peft_model = wrap(backbone.model, loaded.peft_config)
        set_peft_model_state_dict(peft_model, loaded.state_dict)
        peft_model.to(device=backbone.device, dtype=backbone.dtype)
        model = cls(backbone, peft_model, settings if head is None else {**settings, "head": head}, experts)
        path = task_file(info, model.settings, hub)
        model._task = None if path is None else load_task(path, model.head, backbone.hidden_size, model.domains)
        model.picture = read_picture(info)
        return model

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    @property
    def domains(self) -> list[str]:
        """What `fit` chooses from, `shared` and the experts; empty where there are no experts."""
        return [] if self.domain_networks is None else [SHARED, *self.domain_networks.names]

    def network(self, domain: str | None = None) -> Backbone:
        """The backbone that wears the adapter of a domain, by default of the fitted task's.

        Raises:
            ConfigError: there is no such domain, or another one is folded into the weights that all share.
        """
        name = self._current() if domain is None else self._known(domain)
        if self._merged and name != self._merged_domain:
            raise ConfigError(
                f"The model is merged into the domain {self._merged_domain!r}, so it cannot use {name!r}. Load it "
                "again."
            )
        if name == SHARED or self.domain_networks is None:
            return self.backbone
        return self.domain_networks.network(name)

    def _current(self) -> str:
        if self._task is not None:
            return self._task.network
        return self._merged_domain

    def _known(self, domain: str) -> str:
        if domain != SHARED and domain not in self.domains:
            known = ", ".join(map(repr, self.domains)) or f"{SHARED!r} alone"
            raise ConfigError(f"There is no domain {domain!r}; this model has {known}.")
        return domain

    def merge(self) -> MetaLoRAForFewShotClassification:
        """Fold the meta-LoRA into the backbone's weights, for use: a forward then costs what the bare backbone's does.

        Answers stay the same up to rounding. Fitting and saving go on as before (the adapter is kept beside the
        weights and saved as it is), training does not. There is no way back but to load the model again.

        Of a model with experts it is the network of the fitted task's domain, of an unfitted one the shared network,
        and from then on `fit` keeps to it: fit first, then merge.

        Raises:
            AdapterError: the adapter is of a type that is no change of weights; it stays as it was.
        """
        if not self._merged:
            domain = self._current()
            self._merged, self._merged_domain = merge_layers(self.network(domain)), domain
        self._untuned = None  # a tuned adapter is the model's own from here on
        return self

    def features(self, pixel_values: torch.Tensor, domain: str | None = None) -> torch.Tensor:
        """Normalised images (B, 3, H, W) to embeddings (B, D), by the network of a domain, by default of the fitted
        task's."""
        return self.network(domain).features(pixel_values.to(self.device))

    def _embeddings(self, pixel_values: torch.Tensor, domain: str | None = None) -> torch.Tensor:
        """`features`, checked to be finite."""
        features = self.features(pixel_values, domain)
        check_embeddings(features, pixel_values, self.backbone.name)
        return features

    def forward(
        self,
        support_pixel_values: torch.Tensor,
        support_labels: torch.Tensor,
        query_pixel_values: torch.Tensor,
        query_labels: torch.Tensor | None = None,
    ) -> FewShotOutput:
        """Classify one task in a single forward pass; with experts, through the one that the support images choose.

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
        domain = self._domain_of(support_pixel_values, support_labels)
        features = self._embeddings(torch.cat([support_pixel_values, query_pixel_values]), domain)
        support, query = features.split([len(support_pixel_values), len(query_pixel_values)])
        statistics = self.head.statistics(support, support_labels, ways)
        logits = self.head.logits(query, self.head.prepare(statistics))
        loss = None if query_labels is None else F.cross_entropy(logits.float(), query_labels.to(self.device))
        return FewShotOutput(loss=loss, logits=logits, prototypes=self.head.prototypes(statistics))

    @torch.no_grad()
    def _domain_of(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> str:
        if self.domain_networks is None or self._merged:
            return self._merged_domain
        return self.domain_networks.choose(self._looks([pixel_values]), labels).name

    def _looks(self, batches: Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Embeddings (N, D) of batches of normalised images by the bare backbone and the network of every domain."""
        assert self.domain_networks is not None
        networks = {FROZEN: self.domain_networks.frozen, **{name: self.network(name) for name in self.domains}}
        looks: dict[str, list[torch.Tensor]] = {name: [] for name in networks}
        for pixel_values in batches:
            for name, network in networks.items():
                looks[name].append(network.features(pixel_values.to(self.device)))
                check_embeddings(looks[name][-1], pixel_values, network.name)
        return {name: torch.cat(parts).float() for name, parts in looks.items()}

    @torch.inference_mode()
    def _choice(
        self, images: Any, names: list[Any], failures: dict[int, str] | None, domain: str | None
    ) -> tuple[torch.Tensor, list[Any], DomainChoice | None]:
        if domain is None and self._merged:
            domain = self._merged_domain
        if domain is not None or self.domain_networks is None:
            name = self._known(domain or SHARED)
            features = self._seen(images, failures, name).float()
            given = DomainChoice(name) if self.domains else None
            return features, without_failures(names, failures or {}), given
        if failures is not None:
            failures.clear()  # of an earlier call
        looks = self._looks(pixel_batches(as_batch(images), self.backbone, 64, failures))
        kept = without_failures(names, failures or {})
        numbers = {name: number for number, name in enumerate(dict.fromkeys(kept))}
        labels = torch.tensor([numbers[name] for name in kept], device=self.device)
        choice = self.domain_networks.choose(looks, labels)
        return looks[choice.name], kept, choice

    def preprocess(self, images: Any) -> torch.Tensor:
        """What `features` and `forward` take: images in any form that `fit` takes to normalised (N, 3, S, S)."""
        return to_pixel_values(as_batch(images), self.backbone)

    @torch.inference_mode()
    def embed(
        self,
        images: Any,
        batch_size: int = 64,
        *,
        failures: dict[int, str] | None = None,
        progress: bool = False,
        domain: str | None = None,
    ) -> torch.Tensor:
        """Images in any form that `fit` takes to embeddings (N, D) on the model's device.

        Files are decoded by threads, at most two batches ahead, so that their number does not matter to memory.

        Args:
            failures: takes the number and the error of each image that cannot be read, which is left out.
            domain (`str`, *optional*): whose network embeds them; by default that of the fitted task.

        Raises:
            AdapterError: the embeddings are not finite.
            ConfigError: there is no such domain.
        """
        domain = self._current() if domain is None else domain  # one for all batches, whatever is fitted meanwhile
        batches = pixel_batches(as_batch(images), self.backbone, batch_size, failures, progress)
        parts = [self._embeddings(pixel_values, domain) for pixel_values in batches]
        if not parts:  # all of them failed
            return torch.zeros(0, self.backbone.hidden_size, device=self.device)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def fit(
        self,
        images: Any,
        labels: Sequence[Any] | None = None,
        *,
        failures: dict[int, str] | None = None,
        domain: str | None = None,
    ) -> MetaLoRAForFewShotClassification:
        self._untune()
        return super().fit(images, labels, failures=failures, domain=domain)

    fit.__doc__ = FewShotClassifier.fit.__doc__

    def tune(
        self,
        images: Any,
        labels: Sequence[Any] | None = None,
        config: TaskTuningConfig | None = None,
        *,
        domain: str | None = None,
    ) -> MetaLoRAForFewShotClassification:
        """Learn a task as `fit` does, then tune the meta-LoRA on its support images; the prototypes follow.

        Of a model with experts the one is tuned that the support images choose.

        By default an image that is alone in its class teaches nothing: with one image of each class this is `fit`.
        Else it takes a second or more where `fit` takes one forward pass; docs/tuning.md says what it gains. It begins
        with the meta-LoRA as it was loaded, to which `fit` and the next `tune` return; saving writes the tuned one.
        Other threads must not predict meanwhile.

        Args:
            images: as for `fit`.
            labels: as for `fit`.
            config ([`TaskTuningConfig`], *optional*): how; by default `modeling.tuning.default_config`.
            domain: as for `fit`.

        Raises:
            ConfigError: the model is merged, its head does not score by prototypes, or it has no such domain.
            DataError: as `fit`.
        """
        from .tuning import default_config, tuned_task

        images, names = support_set(images, labels)
        require_two_classes(names)
        config = config or default_config(self.head)
        network = self.tuning_network(config)  # which takes back what was tuned before, so that the choice sees none
        choice = None
        if self.domains:
            _, _, choice = self._choice(images, names, None, domain)
            network = self.tuning_network(config, choice.name if choice else SHARED)
        elif domain is not None:
            self._known(domain)
        self._task = dataclasses.replace(tuned_task(network, self.head, images, names, config), domain=choice)
        return self

    def tuning_network(self, config: TaskTuningConfig, domain: str = SHARED) -> TaskNetwork:
        """The network of a domain, whose adapter learns in the last layers, taken back to how it was loaded.

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
        self._untuned = adapter_network(self.network(domain), config)
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
