"""One method after another on the same episodes of one data set, and what a task costs with each."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeAlias, cast

import torch
from tqdm.auto import tqdm

from ..backbones.backbone import Backbone, extract_features
from ..fewshot.accuracy import ensemble_accuracy, head_accuracy, prototype_accuracy
from ..fewshot.domains import SHARED, DomainRule
from ..fewshot.episodes import EpisodeSet, sample_episodes
from ..fewshot.heads import HEADS, make_head
from ..finetuning import TaskTuning, TaskTuningConfig, tuning_methods
from ..images.labelled import LabelledImages
from ..merging import MergingMethod, Selection, make_method, tuning_free_methods
from ..modeling.domains import FROZEN
from ..modeling.meta_lora import MetaLoRAForFewShotClassification
from ..modeling.tuning import default_config
from ..pool.pool import AdapterPool
from .config import FROZEN_METHODS, EpisodeConfig
from .memory import peak_bytes
from .recipe import STATIC, TUNED
from .selection import selected_accuracy
from .stored_features import NetworkFeatures, StoredFeatures
from .tuned import MetaLoRATuning, tuned_accuracy


#: Methods that use the backbone alone, whatever the pool.
POOLLESS = {*FROZEN_METHODS, "linear-probe", "full-tuning", "lora-linear"}


#: (E,) accuracies, in per cent, of features (N, D) on episodes.
Score: TypeAlias = Callable[[torch.Tensor, EpisodeSet], torch.Tensor]


@dataclasses.dataclass
class MethodResult:
    """(E,) accuracies in per cent, and the cost of one task: its images through the networks, tuning, scoring."""

    accuracies: torch.Tensor
    seconds_per_task: float
    peak_memory_mb: float


def _score(method: str, model: MetaLoRAForFewShotClassification | None) -> Score:
    """How the features of a method are judged: by its head, or by prototypes."""
    head, settings = method.partition(" + ")[2], model.settings if model else {}
    if head:
        return partial(head_accuracy, head=make_head(head, settings))
    return partial(prototype_accuracy, **FROZEN_METHODS.get(method, {"metric": settings.get("metric", "cosine")}))


def draw_episodes(data: LabelledImages, config: EpisodeConfig) -> dict[int, EpisodeSet]:
    """The episodes of an evaluation by shots, the same for every method.

    Raises:
        DataError: too few classes or images for an episode.
    """
    names = (data.label_names, data.name)
    return {
        k: sample_episodes(data.labels, config.ways, k, config.queries, config.episodes, config.seed, *names)
        for k in dict.fromkeys(config.shots)
    }


class EvaluationEngine:
    """Runs methods on one data set. Features that several methods share are computed once.

    A method is one of `config.all_methods()`, a merge with a scale (`ties:0.3`), a model's name, either `frozen` or a
    model with a head (`frozen + lda`), a method that tunes (`finetuning.tuning_methods`), or a model whose shared
    network is tuned (`meta-lora-tuned`). A model with experts classifies each episode with the network that its
    support set chooses; under its name and `-shared` it always uses the shared one.

    Args:
        data: the images.
        episodes: by shots; methods that tune a network see the first `tuning_episodes` of them.
        backbone: the bare backbone.
        pool (*optional*): the adapters, for methods that use them.
        models: meta-LoRAs by name.
        tuning: settings by method that differ from the method's own.
        seed: of the methods that draw at random.
        batch_size: images of one forward.
        bar (*optional*): counts passes over the data set.
        stored (*optional*): takes and gives features, so that no network sees an image twice.
    """

    def __init__(
        self,
        data: LabelledImages,
        episodes: dict[int, EpisodeSet],
        backbone: Backbone,
        pool: AdapterPool | None,
        models: dict[str, MetaLoRAForFewShotClassification],
        *,
        tuning: dict[str, dict[str, Any]] | None = None,
        tuning_episodes: int = 0,
        seed: int = 0,
        batch_size: int = 128,
        bar: tqdm | None = None,
        stored: StoredFeatures | None = None,
    ):
        self.data, self.episodes, self.backbone, self.pool, self.models = data, episodes, backbone, pool, models
        self.tuning, self.tuning_episodes, self.batch_size, self.bar = tuning or {}, tuning_episodes, batch_size, bar
        self.seed, self._baselines, self.stored = seed, tuning_free_methods(seed), stored
        self._features: dict[str, NetworkFeatures] = {}
        #: of models with experts, by method and shots: how many episodes chose each domain
        self.chosen: dict[tuple[str, int], Counter[str]] = {}

    def tunes(self, method: str) -> bool:
        return method in tuning_methods() or (method.endswith(TUNED) and method.removesuffix(TUNED) in self.models)

    def transductive(self, method: str) -> bool:
        _, plus, head = method.partition(" + ")
        return bool(plus) and HEADS[head].transductive

    def count(self, method: str, shots: int) -> int:
        """How many episodes a method runs on."""
        return self.tuning_episodes if self.tunes(method) else len(self.episodes[shots])

    def settings(self, method: str) -> dict[str, Any]:
        """What a method's numbers depend on besides data, backbone, adapters and meta-LoRA."""
        if self.tunes(method):
            tuning = self._tuning(method)
            own = {key: value for key, value in vars(tuning).items() if isinstance(value, int)}
            return {"kind": type(tuning).__name__, **own, **tuning.config.to_dict()}
        if baseline := self._baseline(method):
            return {"kind": type(baseline).__name__, **vars(baseline)}
        model, chooses = self._model(method)
        trained = model.settings if model else {}
        known = ("metric", "temperature", "head_parameters", *(["domains"] if chooses else []))
        learned = {key: trained[key] for key in known if key in trained}
        rule = {"rule": dataclasses.asdict(DomainRule())} if chooses else {}
        return {"head": method.partition(" + ")[2], **FROZEN_METHODS.get(method, {}), **learned, **rule}

    def accuracies(self, method: str, shots: int) -> torch.Tensor:
        """(E,) accuracies of a method that does not tune, in per cent."""
        return self._scored(method, shots, measure_memory=False)[0]

    def result(self, method: str, shots: int) -> MethodResult:
        """Accuracies of any method, with what a task costs."""
        if self.tunes(method):
            return self._result_of_tuning(method, shots)
        accuracies, networks, forwards, scoring = self._scored(method, shots, measure_memory=True)
        each = sum(network.seconds for network in networks) / len(networks)
        seconds = each * forwards + scoring / len(accuracies)
        return MethodResult(accuracies, seconds, networks[0].bytes[shots] / 1e6)

    def forget(self, method: str) -> None:
        """Give back the memory of features that no other method shares."""
        self._features = {key: value for key, value in self._features.items() if not key.startswith(f"{method}/")}

    def _baseline(self, method: str) -> MergingMethod | None:
        """The merging method of this name, which may end in a scale."""
        if method not in self._baselines and method.partition(":")[0] in self._baselines:
            self._baselines[method] = make_method(method, self.seed)
        return self._baselines.get(method)

    def _tuning(self, method: str) -> TaskTuning:
        changed = self.tuning.get(method, {})
        model = self.models.get(method.removesuffix(TUNED)) if method.endswith(TUNED) else None
        if model is not None:
            return MetaLoRATuning(model, TaskTuningConfig(**{**default_config(model.head).to_dict(), **changed}))
        kind = type(tuning_methods()[method])
        return kind(TaskTuningConfig(**{**kind.defaults, **changed}))

    def _result_of_tuning(self, method: str, shots: int) -> MethodResult:
        every = self.episodes[shots]
        drawn = EpisodeSet(every.episodes[: self.tuning_episodes], every.ways, shots)
        accuracies, costs = tuned_accuracy(self._tuning(method), self.pool, self.data.pixels, drawn, memory=True)
        seconds = costs["image"] * len(self._images_of_a_task(shots)) + costs["task"]
        return MethodResult(accuracies, seconds, costs["bytes"] / 1e6)

    def _scored(
        self, method: str, shots: int, measure_memory: bool
    ) -> tuple[torch.Tensor, list[NetworkFeatures], float, float]:
        """(E,) accuracies, the networks, forwards of one task, and the seconds that scoring all tasks took."""
        drawn, images = self.episodes[shots], len(self._images_of_a_task(shots))
        if baseline := self._baseline(method):
            pool = cast(AdapterPool, self.pool)
            networks = self._features_of_baseline(method, baseline, pool, measure_memory)
            features = [network.features for network in networks]
            choice = baseline.choice(pool) if isinstance(baseline, Selection) else None
            started = time.perf_counter()
            if choice is None:
                accuracies = ensemble_accuracy(features, drawn)
                return accuracies, networks, images * len(networks), time.perf_counter() - started
            accuracies, looks, _ = selected_accuracy(features, drawn, choice)
            # the support set goes through the networks that the choice asks, the queries through one
            support = drawn.ways * shots
            return accuracies, networks, looks * support + images - support, time.perf_counter() - started
        model, chooses = self._model(method)
        score = _score(method, model)
        if model is not None and chooses:
            return self._chosen(method, model, shots, score, measure_memory)
        network = self._features_of(FROZEN if model is None else self._name(model), measure_memory)
        started = time.perf_counter()
        accuracies = score(network.features, drawn)
        return accuracies, [network], images, time.perf_counter() - started

    def _chosen(
        self,
        method: str,
        model: MetaLoRAForFewShotClassification,
        shots: int,
        score: Score,
        measure_memory: bool,
    ) -> tuple[torch.Tensor, list[NetworkFeatures], float, float]:
        """As `_scored`, of a model with experts: support images go through all networks, queries through one."""
        drawn, experts = self.episodes[shots], model.domain_networks
        assert experts is not None
        names, source = [SHARED, FROZEN, *experts.names], self._name(model)
        networks = [self._features_of(source, measure_memory), self._features_of(FROZEN, False)]
        networks += [self._features_of(source, False, name) for name in experts.names]

        def choice(look: Callable[[int], torch.Tensor], labels: torch.Tensor) -> int:
            return names.index(experts.choose({name: look(i) for i, name in enumerate(names)}, labels).name)

        started = time.perf_counter()
        found = selected_accuracy([network.features for network in networks], drawn, choice, score)
        seconds = time.perf_counter() - started
        self.chosen[method, shots] = Counter(names[i] for i in found.chosen.tolist())
        support, images = drawn.ways * shots, len(self._images_of_a_task(shots))
        return found.accuracies, networks, found.looks * support + images - support, seconds

    def _model(self, method: str) -> tuple[MetaLoRAForFewShotClassification | None, bool]:
        """The model of a method that does not tune, None for the bare backbone's, and whether each task chooses."""
        base = method.partition(" + ")[0]
        model = self.models.get(base)
        if model is None:
            return self.models.get(base.removesuffix(STATIC)), False
        return model, bool(model.domains)

    def _name(self, model: MetaLoRAForFewShotClassification) -> str:
        return next(name for name, own in self.models.items() if own is model)

    def _features_of_baseline(
        self, method: str, baseline: MergingMethod, pool: AdapterPool, measure_memory: bool
    ) -> list[NetworkFeatures]:
        keys = [key for key in self._features if key.startswith(f"{method}/")]
        if not keys:
            networks = list(baseline.networks(pool))
            self._expect(len(networks))
            for i, network in enumerate(networks):
                features = self._forward(network, measure_memory and i == 0)
                if len(networks) > 1:  # many networks' features at once
                    features.features = features.features.half()
                keys.append(f"{method}/{i}")
                self._features[keys[-1]] = features
        return [self._features[key] for key in keys]

    def _features_of(self, source: str, measure_memory: bool, domain: str = SHARED) -> NetworkFeatures:
        """Of the bare backbone, `FROZEN`, or of a model's network for a domain."""
        key = source if domain == SHARED else f"{source}: {domain}"
        if key not in self._features:
            backbone = self.backbone if source == FROZEN else self.models[source].network(domain)
            self._expect(1)
            self._features[key] = self._forward(nullcontext(backbone), measure_memory)
        return self._features[key]

    def _forward(self, network: AbstractContextManager[Backbone], measure_memory: bool) -> NetworkFeatures:
        with network as backbone:
            path = None if self.stored is None else self.stored.path(backbone)
            known = None if self.stored is None else self.stored.load(path)
            found = known or self._extract(backbone)
            unmeasured = [shots for shots in self.episodes if measure_memory and shots not in found.bytes]
            for shots in unmeasured:
                pixels = self.data.pixels[self._images_of_a_task(shots)]
                found.bytes[shots] = peak_bytes(partial(extract_features, backbone, pixels), backbone.device)
        if self.stored is not None and path is not None and (known is None or unmeasured):
            self.stored.save(path, found)
        if self.bar is not None:
            self.bar.update()
        return found

    def _extract(self, backbone: Backbone) -> NetworkFeatures:
        started = time.perf_counter()
        features = extract_features(backbone, self.data.pixels, self.batch_size)
        return NetworkFeatures(features, (time.perf_counter() - started) / len(self.data), {})

    def _expect(self, passes: int) -> None:
        if self.bar is not None:
            self.bar.total += passes

    def _images_of_a_task(self, shots: int) -> torch.Tensor:
        first = self.episodes[shots].episodes[0]
        return torch.cat([first.support.flatten(), first.query])
