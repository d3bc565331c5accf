"""One method after another on the same episodes of one data set, with what each task costs."""

from __future__ import annotations

import dataclasses
import time
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch

from ..backbones.backbone import Backbone, extract_features
from ..fewshot.accuracy import ensemble_accuracy, head_accuracy, prototype_accuracy
from ..fewshot.episodes import EpisodeSet
from ..fewshot.heads import HEADS, make_head
from ..finetuning import TaskTuning, TaskTuningConfig, tuning_methods
from ..images.labelled import LabelledImages
from ..merging import Composition, Selection, tuning_free_methods
from ..modeling.meta_lora import MetaLoRAForFewShotClassification
from ..modeling.tuning import default_config
from ..pool.pool import AdapterPool
from .evaluate import CENTRES
from .memory import peak_bytes
from .recipe import TUNED
from .selection import selected_accuracy
from .tuned import MetaLoraTuning, tuned_accuracy


#: Methods that use the backbone alone, whatever the pool.
POOLLESS = {*CENTRES, "linear-probe", "full-tuning", "lora-linear"}


@dataclasses.dataclass
class Verdict:
    """(E,) accuracies in per cent, and the cost of one task: its images through the networks, tuning, scoring."""

    accuracies: torch.Tensor
    seconds_per_task: float
    peak_memory_mb: float


@dataclasses.dataclass
class Seen:
    """Features (N, D) of a data set by one network, seconds for each image, and, of the first of a method's networks,
    the bytes that the images of one task hold at most, by shots."""

    features: torch.Tensor
    seconds: float
    bytes: dict[int, int]


class Judge:
    """Judges methods on one data set. Features that several methods share are computed once.

    Args:
        data: the images.
        episodes: by shots; methods that tune a network see the first `tuning_episodes` of them.
        pool: the adapters.
        models: meta-LoRAs by name.
        tuning: settings by method that differ from the method's own.
        seed: of the methods that draw at random.
    """

    def __init__(
        self,
        data: LabelledImages,
        episodes: dict[int, EpisodeSet],
        pool: AdapterPool,
        models: dict[str, MetaLoRAForFewShotClassification],
        *,
        tuning: dict[str, dict[str, Any]],
        tuning_episodes: int,
        seed: int = 0,
    ):
        self.data, self.episodes, self.pool, self.models = data, episodes, pool, models
        self.tuning, self.tuning_episodes = tuning, tuning_episodes
        self.compositions = tuning_free_methods(seed)
        self._seen: dict[str, Seen] = {}

    def tunes(self, method: str) -> bool:
        return method in tuning_methods() or (method.endswith(TUNED) and method.removesuffix(TUNED) in self.models)

    def transductive(self, method: str) -> bool:
        _, plus, head = method.partition(" + ")
        return bool(plus) and HEADS[head].transductive

    def count(self, method: str, shots: int) -> int:
        """How many episodes a method is judged on."""
        return self.tuning_episodes if self.tunes(method) else len(self.episodes[shots])

    def settings(self, method: str) -> dict[str, Any]:
        """What a method's numbers depend on besides data, backbone, adapters and meta-LoRA."""
        if self.tunes(method):
            tuning = self._tuning(method)
            own = {key: value for key, value in vars(tuning).items() if isinstance(value, int)}
            return {"kind": type(tuning).__name__, **own, **tuning.config.to_dict()}
        if method in self.compositions:
            return {"kind": type(self.compositions[method]).__name__, **vars(self.compositions[method])}
        base, _, head = method.partition(" + ")
        trained = self.models[base].settings if base in self.models else {}
        known = ("metric", "temperature", "head_parameters")
        return {"head": head, **CENTRES.get(method, {}), **{key: trained[key] for key in known if key in trained}}

    def judge(self, method: str, shots: int) -> Verdict:
        """The verdict on one method at one number of shots."""
        if self.tunes(method):
            return self._judge_tuning(method, shots)
        if method in self.compositions:
            return self._judge_composition(method, shots)
        base, _, head = method.partition(" + ")
        drawn, seen = self.episodes[shots], self._look_once(base if base in self.models else "frozen")
        settings = self.models[base].settings if base in self.models else {}
        started = time.perf_counter()
        if head:
            found = head_accuracy(seen.features, drawn, make_head(head, settings))
        else:
            options = CENTRES.get(method, {"metric": settings.get("metric", "cosine")})
            found = prototype_accuracy(seen.features, drawn, **options)
        return self._verdict(shots, [seen], found, started)

    def forget(self, method: str) -> None:
        """Give back the memory of features that no other method shares."""
        self._seen = {key: seen for key, seen in self._seen.items() if not key.startswith(f"{method}/")}

    def _tuning(self, method: str) -> TaskTuning:
        changed = self.tuning.get(method, {})
        model = self.models.get(method.removesuffix(TUNED)) if method.endswith(TUNED) else None
        if model is not None:
            return MetaLoraTuning(model, TaskTuningConfig(**{**default_config(model.head).to_dict(), **changed}))
        kind = type(tuning_methods()[method])
        return kind(TaskTuningConfig(**{**kind.defaults, **changed}))

    def _judge_tuning(self, method: str, shots: int) -> Verdict:
        every = self.episodes[shots]
        drawn = EpisodeSet(every.episodes[: self.tuning_episodes], every.ways, shots)
        found, costs = tuned_accuracy(self._tuning(method), self.pool, self.data.pixels, drawn, memory=True)
        seconds = costs["image"] * len(self._images_of_a_task(shots)) + costs["task"]
        return Verdict(found, seconds, costs["bytes"] / 1e6)

    def _judge_composition(self, method: str, shots: int) -> Verdict:
        composition, drawn = self.compositions[method], self.episodes[shots]
        members = self._members(method, composition)
        features = [seen.features for seen in members]
        choice = composition.choice(self.pool) if isinstance(composition, Selection) else None
        started = time.perf_counter()
        if choice is None:
            return self._verdict(shots, members, ensemble_accuracy(features, drawn), started)
        found, looked = selected_accuracy(features, drawn, choice)
        # the support set goes through the networks that the choice asks, the queries through one
        support = drawn.ways * shots
        forwards = looked * support + len(self._images_of_a_task(shots)) - support
        return self._verdict(shots, members, found, started, forwards)

    def _members(self, method: str, composition: Composition) -> list[Seen]:
        keys = [key for key in self._seen if key.startswith(f"{method}/")]
        if not keys:
            networks = list(composition.networks(self.pool))
            for i, network in enumerate(networks):
                seen = self._look(network, measured=i == 0)
                if len(networks) > 1:  # many networks' features at once
                    seen.features = seen.features.half()
                keys.append(f"{method}/{i}")
                self._seen[keys[-1]] = seen
        return [self._seen[key] for key in keys]

    def _look_once(self, source: str) -> Seen:
        if source not in self._seen:
            backbone = self.pool.backbone if source == "frozen" else self.models[source].backbone
            self._seen[source] = self._look(nullcontext(backbone))
        return self._seen[source]

    def _look(self, network: AbstractContextManager[Backbone], measured: bool = True) -> Seen:
        with network as backbone:
            started = time.perf_counter()
            features = extract_features(backbone, self.data.pixels)
            seconds = (time.perf_counter() - started) / len(self.data)
            held = {}
            for shots in self.episodes if measured else ():
                pixels = self.data.pixels[self._images_of_a_task(shots)]
                held[shots] = peak_bytes(partial(extract_features, backbone, pixels), backbone.device)
        return Seen(features, seconds, held)

    def _images_of_a_task(self, shots: int) -> torch.Tensor:
        first = self.episodes[shots].episodes[0]
        return torch.cat([first.support.flatten(), first.query])

    def _verdict(
        self, shots: int, seen: list[Seen], found: torch.Tensor, started: float, forwards: float | None = None
    ) -> Verdict:
        """Of what was found since `started`; `forwards` of a task, by default all its images through all networks."""
        scoring = (time.perf_counter() - started) / len(found)
        each = sum(one.seconds for one in seen) / len(seen)
        if forwards is None:
            forwards = len(self._images_of_a_task(shots)) * len(seen)
        return Verdict(found, each * forwards + scoring, seen[0].bytes[shots] / 1e6)
