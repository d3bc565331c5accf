"""The same episodes for every method: what `lora-recycle evaluate` runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import torch
from tqdm.auto import tqdm

from ..backbones.backbone import Backbone, extract_features
from ..errors import ConfigError
from ..fewshot.accuracy import ensemble_accuracy, head_accuracy, prototype_accuracy
from ..fewshot.episodes import EpisodeSet, sample_episodes
from ..fewshot.heads import FewShotHead, make_head
from ..images.labelled import LabelledImages
from ..merging import Composition, Selection, tuning_free_methods
from ..modeling.meta_lora import MetaLoRAForFewShotClassification
from ..pool.pool import AdapterPool
from .results import summarise
from .selection import selected_accuracy


#: Class centres on the bare backbone: options of `prototype_accuracy`. All is compared with `frozen`.
CENTRES: dict[str, dict[str, Any]] = {
    "frozen": {},
    "frozen-centred": {"centred": True},
    "frozen-euclidean": {"metric": "euclidean"},
}
DEFAULT_METHODS = ("frozen-centred", "average", "ensemble", "random")
ALL_METHODS = (*CENTRES, *tuning_free_methods())


@dataclasses.dataclass
class Evaluation:
    """`rows` as `summarise` gives them, per-episode `accuracies` by (shots, method), and `notes` in plain words."""

    rows: list[dict]
    accuracies: dict[tuple[int, str], torch.Tensor]
    notes: list[str]


def evaluate(
    data: LabelledImages,
    model: MetaLoRAForFewShotClassification | None = None,
    *,
    backbone: Backbone | None = None,
    pool: AdapterPool | None = None,
    methods: Sequence[str] | None = None,
    heads: Sequence[str] = (),
    ways: int = 5,
    shots: Sequence[int] = (1, 5),
    queries: int = 15,
    episodes: int = 600,
    seed: int = 0,
    batch_size: int = 128,
    progress: bool = False,
) -> Evaluation:
    """Judge the frozen backbone, the meta-LoRA and, with a pool, ways to use it without tuning.

    Features of every image are computed once for each network of a method; all methods see the same episodes.

    Args:
        data: images of classes that no adapter has seen.
        model: the meta-LoRA; without it only the other methods are judged.
        backbone: the bare backbone; the pool's by default, else the model's base is loaded again.
        pool: adapters for the methods of `merging.tuning_free_methods`.
        methods: of `ALL_METHODS`; `DEFAULT_METHODS` by default, without a pool those of them that need none. `frozen`
            and a given `model` are always judged.
        heads: names of few-shot heads to judge too, on the frozen backbone and on the meta-LoRA (rows such as
            `meta-lora + lda`). The methods' own rows are class centres. Queries of an episode are one set to a
            transductive head, which knows more than the other methods: compare it with its own kind.

    Raises:
        ConfigError: an unknown method or head, a method that needs a pool where there is none, or nothing to judge.
        DataError: too few classes or images for an episode, or too few queries for a head.
    """
    chosen, names = _checked_methods(methods, pool), data.label_names
    worn = [make_head(name, model.settings if model else {}) for name in heads]
    drawn = {k: sample_episodes(data.labels, ways, k, queries, episodes, seed, names, data.name) for k in shots}
    bar = tqdm(total=1 + (model is not None), desc=f"evaluate {data.name}", unit="pass", disable=not progress)
    judge = _Judge(data, drawn, batch_size, bar)
    if backbone is None and pool is not None:
        backbone = pool.backbone
    elif backbone is None and model is not None:
        backbone = _bare(model)
    elif backbone is None:
        raise ConfigError("there is nothing to judge: pass a model, a pool or a backbone.")
    frozen = judge.features(backbone)
    compositions = tuning_free_methods(seed)
    for method in ["frozen", *chosen]:
        if method in CENTRES:
            judge.score(method, frozen, **CENTRES[method])
        else:
            judge.score_composition(method, compositions[method], cast(AdapterPool, pool))  # `chosen` is checked
    judge.score_heads("frozen", frozen, worn)
    if model is not None:
        features = judge.features(model.backbone)
        judge.score("meta-lora", features, metric=model.settings.get("metric", "cosine"))
        judge.score_heads("meta-lora", features, worn)
    bar.close()
    rows, notes = [], []
    for k in shots:
        rows += summarise({m: v for (s, m), v in judge.accuracies.items() if s == k}, data.name, ways, k)
        notes += drawn[k].notes
    return Evaluation(rows, judge.accuracies, notes)


@dataclasses.dataclass
class _Judge:
    """Scores one method after another on the same episodes, which are drawn once for each number of shots."""

    data: LabelledImages
    episodes: dict[int, EpisodeSet]
    batch_size: int
    bar: tqdm
    accuracies: dict[tuple[int, str], torch.Tensor] = dataclasses.field(default_factory=dict)

    def features(self, network: Backbone) -> torch.Tensor:
        found = extract_features(network, self.data.pixels, self.batch_size)
        self.bar.update()
        return found

    def score(self, method: str, features: torch.Tensor, **options: Any) -> None:
        for k, drawn in self.episodes.items():
            self.accuracies[k, method] = prototype_accuracy(features, drawn, **options)

    def score_heads(self, method: str, features: torch.Tensor, heads: Sequence[FewShotHead]) -> None:
        for head in heads:
            for k, drawn in self.episodes.items():
                self.accuracies[k, f"{method} + {head.name}"] = head_accuracy(features, drawn, head)

    def score_composition(self, method: str, composition: Composition, pool: AdapterPool) -> None:
        """One or several networks: all are heard, or for each episode the one that its support set chooses."""
        networks, members = list(composition.networks(pool)), []
        self.bar.total += len(networks)
        for network in networks:
            with network as backbone:
                features = self.features(backbone)
            members.append(features.half() if len(networks) > 1 else features)
        choice = composition.choice(pool) if isinstance(composition, Selection) else None
        for k, drawn in self.episodes.items():
            if choice:
                self.accuracies[k, method], _ = selected_accuracy(members, drawn, choice)
            else:
                self.accuracies[k, method] = ensemble_accuracy(members, drawn)


def _checked_methods(methods: Sequence[str] | None, pool: AdapterPool | None) -> list[str]:
    if methods is None:
        return [method for method in DEFAULT_METHODS if pool is not None or method in CENTRES]
    unknown = [method for method in methods if method not in ALL_METHODS]
    if unknown:
        raise ConfigError(f"there is no method {unknown[0]!r}; there are {', '.join(ALL_METHODS)}.")
    homeless = [method for method in methods if pool is None and method not in CENTRES]
    if homeless:
        raise ConfigError(f"{homeless[0]} needs a pool of adapters: pass one (--pool), or leave the method out.")
    return list(dict.fromkeys(methods))


def _bare(model: MetaLoRAForFewShotClassification) -> Backbone:
    """The model's own backbone once more, without the meta-LoRA."""
    config = model.peft_model.peft_config["default"]
    base = cast(str, config.base_model_name_or_path)
    return Backbone.from_pretrained(base, revision=config.revision, device=model.device)
