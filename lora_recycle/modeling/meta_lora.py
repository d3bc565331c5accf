"""MetaLoRAForFewShotClassification: the model that classifies a new task from its support images, untuned."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers.utils import ModelOutput

from ..adapters.peft_wrap import tuner_layers
from ..adapters.pull import pull_adapter
from ..backbones.backbone import Backbone
from ..errors import ConfigError
from ..fewshot.domains import SHARED, DomainChoice
from ..fewshot.heads import make_head
from ..hub.download import HubOptions
from ..hub.embedded import resolve_meta_lora
from ..hub.repo_files import SIDECAR_FILE
from .classifier import FewShotClassifier, described_task
from .domains import DomainNetworks
from .loading import checked_options, load_networks
from .networks import AdaptedNetworks
from .publishing import push_adapter_folder
from .serialization import write_meta_lora
from .serving import TaskServer
from .sidecar import read_picture, read_sidecar, task_file
from .support import class_numbers, require_two_classes, support_set, without_failures
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


class MetaLoRAForFewShotClassification(AdaptedNetworks, TaskServer):
    """A frozen ViT with a meta-LoRA applied, and a few-shot head on its embeddings (prototypes by default).

    A meta-LoRA made from a pool of several domains also has experts: further networks on the same weights. `fit`
    chooses one of them, or the shared network, by the support images; the fitted task uses it from then on.

    Args:
        backbone ([`Backbone`]): of the shared network; its linear layers are wrapped by PEFT in place.
        peft_model: the PEFT model around `backbone.model`; None of a frozen backbone, see `from_backbone`.
        settings (`dict`, *optional*): the sidecar: head, metric, temperature, head parameters, sources, results.
        domain_networks ([`DomainNetworks`], *optional*): the experts.

    Raises:
        ConfigError: there is no head of the name in `settings`, or it does not take the parameters there.
    """

    def __init__(
        self,
        backbone: Backbone,
        peft_model: PeftModel | None,
        settings: dict[str, Any] | None = None,
        domain_networks: DomainNetworks | None = None,
    ):
        super().__init__(backbone, peft_model, domain_networks)
        self.settings = dict(settings or {})
        self.head = make_head(self.settings.get("head", "prototypes"), self.settings)
        #: what it was loaded from
        self.name: str | None = None
        #: PNG of some of the surrogate images that it learned from, where they are at hand
        self.picture: bytes | None = None
        self._task: FewShotTask | None = None
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
        force_download: bool = False,
        subfolder: str = "",
        base_model: str | Path | None = None,
        base_revision: str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device_map: Any = None,
    ) -> MetaLoRAForFewShotClassification:
        """Load a meta-LoRA from a folder or a repo id; `demo` is the one that the package ships.

        The base model is the one that the adapter names, unless `base_model` is given. A saved fitted task is loaded
        too, unless `head` needs other statistics of the support images; then a warning says so.

        Args:
            head (`str`, *optional*): a name in `fewshot.heads.HEADS`; by default the head it was saved with.
            force_download: fetch again what the cache holds.
            subfolder: of a local folder.
            dtype: or its name; float32 by default. `torch_dtype` is its older name.
            device_map: is refused, with what to pass instead.

        Raises:
            AdapterError: files are missing or damaged, or do not fit the base model.
            ConfigError: there is no head of this name, or an option that the model cannot follow.
        """
        if head is not None:
            make_head(head, {})  # an unknown name is an error before anything is fetched
        repo_or_path, dtype = checked_options(repo_or_path, subfolder, dtype, torch_dtype, device_map)
        hub = HubOptions(
            token=token, cache_dir=cache_dir, local_files_only=local_files_only, force_download=force_download
        )
        info = pull_adapter(resolve_meta_lora(repo_or_path), revision=revision, **hub)
        settings = read_sidecar(info.path / SIDECAR_FILE, head)
        backbone, peft_model, experts = load_networks(info, settings, hub, base_model, base_revision, device, dtype)
        model = cls(backbone, peft_model, settings if head is None else {**settings, "head": head}, experts)
        path = task_file(info, model.settings, hub)
        model._task = None if path is None else load_task(path, model.head, backbone.hidden_size, model.domains)
        model.picture, model.name = read_picture(info), str(repo_or_path)
        return model

    @classmethod
    def from_backbone(
        cls, backbone: Backbone | str | Path, *, head: str = "prototypes", **options: Any
    ) -> MetaLoRAForFewShotClassification:
        """A frozen backbone as a model, without any adapter: what a meta-LoRA is to be compared with first.

        It fits, predicts and scores as a meta-LoRA does. There is nothing of it to save but its tasks (`new_task`) and
        nothing to tune.

        Args:
            backbone: a loaded one, a folder or a repo id (`demo`: the embedded one).
            head (`str`, *optional*): a name in `fewshot.heads.HEADS`.
            options: what [`Backbone.from_pretrained`] takes, where it is to be loaded; `torch_dtype` for `dtype` too.

        Raises:
            AdapterError: the backbone is missing, damaged, or of an unknown type.
            ConfigError: there is no head of this name, or an option that the model cannot follow.
        """
        make_head(head, {})
        if not isinstance(backbone, Backbone):
            named = {key: options.pop(key, None) for key in ("dtype", "torch_dtype", "device_map")}
            folder, dtype = checked_options(backbone, options.pop("subfolder", ""), **named)
            backbone = Backbone.from_pretrained(folder, dtype=dtype, **options)
        elif tuner_layers(backbone.model):
            raise ConfigError(f"{backbone.name} wears an adapter. Load the backbone once more for a frozen one.")
        return cls(backbone, None, {"head": head})

    @property
    def frozen(self) -> bool:
        """Whether it is a bare backbone."""
        return self.peft_model is None

    def __repr__(self) -> str:
        name = "" if self.name is None else f"{self.name!r}, "
        kind = "frozen " if self.frozen else ""
        return f"{type(self).__name__}({name}{kind}backbone={self.backbone.name!r}, {described_task(self._task)})"

    def forward(
        self,
        support_pixel_values: torch.Tensor,
        support_labels: torch.Tensor,
        query_pixel_values: torch.Tensor,
        query_labels: torch.Tensor | None = None,
    ) -> FewShotOutput:
        """Classify one task in a single forward pass, through the network that the support images choose.

        Args:
            support_pixel_values: (S, 3, H, W), normalised.
            support_labels: int64 (S,), values 0 to ways - 1, each present.
            query_pixel_values: (Q, 3, H, W). A transductive head takes them as one set.
            query_labels: int64 (Q,); with them the output has a loss.

        Raises:
            AdapterError: the embeddings are not finite.
            DataError: the labels do not number 0 to ways - 1, are all equal or too few; or an image is not finite.
        """
        support_labels = class_numbers(support_pixel_values, support_labels).to(self.device)
        ways = int(support_labels.max()) + 1
        with torch.no_grad():
            domain = self._domain_of(support_pixel_values, support_labels)
        features = self._embeddings(torch.cat([support_pixel_values, query_pixel_values]), domain)
        support, query = features.split([len(support_pixel_values), len(query_pixel_values)])
        statistics = self.head.statistics(support, support_labels, ways)
        logits = self.head.logits(query, self.head.prepare(statistics))
        loss = None if query_labels is None else F.cross_entropy(logits.float(), query_labels.to(self.device))
        return FewShotOutput(loss=loss, logits=logits, prototypes=self.head.prototypes(statistics))

    def _current(self) -> str:
        return self._merged_domain if self._task is None else self._task.network

    def _domain_of(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> str:
        if self.domain_networks is None or self._merged:
            return self._merged_domain
        return self.domain_networks.choose(self.domain_networks.look(self.backbone, [pixel_values]), labels).name

    def _choice(
        self, images: Any, names: list[Any], failures: dict[int, str] | None, domain: str | None
    ) -> tuple[torch.Tensor, list[Any], DomainChoice | None]:
        if domain is None and self.domain_networks is not None and not self._merged:
            return self.domain_networks.embed_chosen(self.backbone, images, names, failures)
        name = self._known(domain or self._merged_domain)
        features = self._seen(images, failures, name).float()
        return features, without_failures(names, failures or {}), DomainChoice(name) if self.domains else None

    def merge(self) -> MetaLoRAForFewShotClassification:
        super().merge()
        self._untuned = None  # a tuned adapter is the model's own from here on
        return self

    merge.__doc__ = AdaptedNetworks.merge.__doc__

    def fit(
        self,
        images: Any,
        labels: Sequence[Any] | None = None,
        *,
        failures: dict[int, str] | None = None,
        domain: str | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
    ) -> MetaLoRAForFewShotClassification:
        self._untune()
        columns = {"image_column": image_column, "label_column": label_column}
        return super().fit(images, labels, failures=failures, domain=domain, **columns)

    fit.__doc__ = FewShotClassifier.fit.__doc__

    def tune(
        self,
        images: Any,
        labels: Sequence[Any] | None = None,
        config: TaskTuningConfig | dict[str, Any] | None = None,
        *,
        domain: str | None = None,
    ) -> MetaLoRAForFewShotClassification:
        """Fit a task, then tune the meta-LoRA (or the expert chosen by the images) and the prototypes on its support
        images.

        `fit` takes one forward pass; this takes a second or more, and docs/tuning.md says what it gains. By default it
        needs two images of a class: with one image per class it equals `fit`. Tuning starts from the meta-LoRA as it
        was loaded, and `fit` and the next `tune` return to it; saving writes the tuned one. No other thread may
        predict meanwhile.

        Args:
            images: as for `fit`.
            labels: as for `fit`.
            config ([`TaskTuningConfig`], *optional*): by default `modeling.tuning.default_config`.
            domain: as for `fit`.

        Raises:
            ConfigError: the model is merged, its head does not score by prototypes, or it has no such domain.
            DataError: as `fit`.
        """
        from .tuning import chosen_config, tuned_task

        images, names = support_set(images, labels)
        require_two_classes(names)
        config = chosen_config(config, self.head)
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
        """The network of a domain, reset to how it was loaded, with the adapter of its last layers trainable.

        Raises:
            ConfigError: the model is merged, or its head does not score by prototypes with the metric of `config`.
        """
        from .tuning import adapter_network, check_head

        if self.frozen:
            raise ConfigError("A frozen backbone has no adapter to tune. Load a meta-LoRA, or use fit.")
        if self._merged:
            raise ConfigError(
                "A merged model cannot be tuned: its adapter is in the weights. Load it again, tune, merge."
            )
        check_head(self.head, config)
        self._untune()
        self._untuned = adapter_network(self.network(domain), config)
        return self._untuned

    def _untune(self) -> None:
        """Reset a tuned adapter to how it was loaded."""
        if self._untuned is not None:
            self._untuned.reset()
            self._untuned = None

    def save_pretrained(self, save_directory: str | Path, *, bits: int | None = None) -> None:
        """Write a plain PEFT adapter with our sidecar, and the fitted task where there is one.

        Args:
            bits (`int`, *optional*): per weight. 16 (bfloat16) is a plain adapter too; 8, 4, 2 and 1 are quantized
                files that only this library reads. By default weights are saved as they are.

        Raises:
            ConfigError: another number of bits, or a frozen backbone, of which there is nothing to save.
            StorageError: the folder holds something other than a meta-LoRA, or cannot be written.
        """
        if self.frozen:
            raise ConfigError(
                "A frozen backbone has no meta-LoRA to save. To keep a task: task = model.new_task().fit(images, "
                "labels); task.save(FILE); model.load_task(FILE)."
            )
        write_meta_lora(self, save_directory, bits)

    def merge_and_save(self, save_directory: str | Path) -> None:
        """Write the network with the meta-LoRA in its weights as a plain transformers checkpoint, image processor
        included, as [`export`] does with `format="transformers"`. The model itself stays as it is.

        Raises:
            AdapterError: the adapter is not a change of weights.
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
            repo_id (`str`): created if it is new.
            private (`bool`, *optional*): whether a new repo is private.
            revision (`str`, *optional*): branch, created from main if it is new.
            create_pr (`bool`, *optional*, defaults to `False`): open a pull request and return its URL.
            bits (`int`, *optional*): as in `save_pretrained`.

        Raises:
            PushError: the base model is a local folder, or the push failed; then nothing of it is in the repo.
        """
        options: dict[str, Any] = {"private": private, "token": token, "revision": revision, "create_pr": create_pr}
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, bits=bits)
            return push_adapter_folder(folder, repo_id, commit_message=commit_message, **options)
