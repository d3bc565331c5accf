"""The same episodes for every method: what `lora-recycle evaluate` runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

import torch
from tqdm.auto import tqdm

from ..backbones.backbone import Backbone
from ..errors import ConfigError
from ..fewshot.heads import make_head
from ..images.labelled import LabelledImages
from ..modeling.meta_lora import MetaLoRAForFewShotClassification
from ..pool.pool import AdapterPool
from ..runtime.terminal import single_line
from .config import EvaluationConfig
from .engine import EvaluationEngine, draw_episodes
from .recipe import STATIC
from .results import summarise
from .stored_features import StoredFeatures


META_LORA = "meta-lora"


@dataclasses.dataclass
class Evaluation:
    """`rows` as `summarise` gives them, per-episode `accuracies` by (shots, method), and `notes` in plain words."""

    rows: list[dict[str, Any]]
    accuracies: dict[tuple[int, str], torch.Tensor]
    notes: list[str]
    #: of a model with experts, for each number of shots: the share of tasks that chose each domain
    domains: list[str] = dataclasses.field(default_factory=list)


def evaluate(
    data: LabelledImages,
    model: MetaLoRAForFewShotClassification | None = None,
    config: EvaluationConfig | dict[str, Any] | None = None,
    *,
    backbone: Backbone | None = None,
    pool: AdapterPool | None = None,
    features_dir: str | Path | None = None,
    progress: bool = False,
) -> Evaluation:
    """Compare the frozen backbone, the meta-LoRA and, with a pool, ways to use it without tuning.

    A meta-LoRA with experts classifies each episode with the network that its support set chooses; `meta-lora-shared`
    is its shared network on all of them.

    Features of every image are computed once for each network of a method; all methods see the same episodes.

    Args:
        data: images of classes that no adapter has seen.
        model: the meta-LoRA; without it only the other methods are compared.
        config ([`EvaluationConfig`], *optional*): episodes and methods. `frozen` and a given `model` always run. Rows
            of heads are named `meta-lora + lda`; all others score by prototypes. A transductive head takes the queries
            of an episode as one set and so knows more than the other methods: compare it with its own kind.
        backbone: the bare backbone; the pool's by default, else the model's base is loaded again.
        pool: adapters for the methods of `merging.tuning_free_methods`.
        features_dir: keeps the features of these images by each network, by checksums of both: other episodes, shots
            and heads then cost no forward. Nothing there is ever deleted but by you.

    Raises:
        ConfigError: an unknown method or head, a method that needs a pool where there is none, or nothing to evaluate.
        DataError: too few classes or images for an episode, or too few queries for a head.
    """
    config = EvaluationConfig.of(config)
    methods = _methods(config, model, pool is not None)
    for head in config.heads:
        make_head(head, model.settings if model else {})  # an unknown name is an error before any forward
    backbone = backbone or _bare(model, pool)
    drawn = draw_episodes(data, config)
    with tqdm(desc=single_line(f"evaluate {data.name}"), unit="pass", total=0, disable=not progress) as bar:
        engine = EvaluationEngine(
            data,
            drawn,
            backbone,
            pool,
            {} if model is None else {META_LORA: model},
            seed=config.seed,
            batch_size=config.batch_size,
            bar=bar,
            stored=None if features_dir is None else StoredFeatures(features_dir, data),
        )
        accuracies: dict[tuple[int, str], torch.Tensor] = {}
        for method in methods:
            accuracies |= {(k, method): engine.accuracies(method, k) for k in drawn}
            engine.forget(method)
    rows: list[dict[str, Any]] = []
    for k in config.shots:
        rows += summarise({m: accuracies[k, m] for m in methods}, data.name, config.ways, k)
    notes = [note for k in config.shots for note in drawn[k].notes]
    return Evaluation(rows, accuracies, notes, _chosen_domains(engine, config))


def _chosen_domains(engine: EvaluationEngine, config: EvaluationConfig) -> list[str]:
    """For each number of shots with a choice, a sentence with the share of tasks that chose each domain."""
    lines = []
    for k in config.shots:
        if chosen := engine.chosen.get((META_LORA, k)):
            shares = ", ".join(f"{name} {count / chosen.total():.0%}" for name, count in chosen.most_common())
            lines.append(f"{META_LORA}, {k} shot{'s' * (k > 1)}: domains that the tasks chose: {shares}.")
    return lines


def _methods(config: EvaluationConfig, model: MetaLoRAForFewShotClassification | None, has_pool: bool) -> list[str]:
    methods = ["frozen", *config.chosen_methods(has_pool), *(f"frozen + {head}" for head in config.heads)]
    if model is None:
        return methods
    static = [META_LORA + STATIC] if model.domains else []
    return [*methods, *static, META_LORA, *(f"{META_LORA} + {head}" for head in config.heads)]


def _bare(model: MetaLoRAForFewShotClassification | None, pool: AdapterPool | None) -> Backbone:
    """The pool's backbone; without a pool the model's own, loaded once more without the meta-LoRA."""
    if pool is not None:
        return pool.backbone
    if model is None:
        raise ConfigError("there is nothing to evaluate: pass a model, a pool or a backbone.")
    if model.peft_model is None:
        return model.backbone
    config = model.peft_model.peft_config["default"]
    base = cast(str, config.base_model_name_or_path)
    return Backbone.from_pretrained(base, revision=config.revision, device=model.device)
