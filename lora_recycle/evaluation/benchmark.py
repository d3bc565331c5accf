"""The same episodes for every method: what `lora-recycle evaluate` runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tqdm.auto import tqdm

from ..backbones import Backbone, extract_features
from ..images import LabelledImages
from ..modeling.meta_lora import MetaLoRAForFewShotClassification
from ..pool import AdapterPool
from .episodes import sample_episodes
from .protocol import ensemble_accuracy, prototype_accuracy, summarise


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
    ways: int = 5,
    shots: Sequence[int] = (1, 5),
    queries: int = 15,
    episodes: int = 600,
    seed: int = 0,
    batch_size: int = 128,
    progress: bool = False,
) -> Evaluation:
    """Judge the frozen backbone, the meta-LoRA and, with a pool, its average, its ensemble and a random control.

    Features of every image are computed once for each method; all methods see the same episodes.

    Args:
        data: images of classes that no adapter has seen.
        model: the meta-LoRA; without it only the other methods are judged.
        backbone: the bare backbone; the pool's by default, else the model's base is loaded again.
        pool: adapters for `average`, `ensemble` (one forward each) and `random`.

    Raises:
        DataError: too few classes or images for an episode.
    """
    sets = [sample_episodes(data.labels, ways, k, queries, episodes, seed, data.label_names, data.name) for k in shots]
    if backbone is None:
        backbone = pool.backbone if pool is not None else _bare(model)
    total = 1 + (model is not None) + (len(pool) + 2 if pool else 0)
    bar = tqdm(total=total, desc=f"evaluate {data.name}", unit="pass", disable=not progress)

    def passed(network: Backbone) -> torch.Tensor:
        features = extract_features(network, data.pixels, batch_size)
        bar.update()
        return features

    accuracies: dict[tuple[int, str], torch.Tensor] = {}

    def judge(method: str, features: torch.Tensor, **options) -> None:
        for k, drawn in zip(shots, sets, strict=True):
            accuracies[k, method] = prototype_accuracy(features, drawn, **options)

    frozen = passed(backbone)
    judge("frozen", frozen)
    judge("frozen-centred", frozen, centred=True)
    if pool is not None:
        with pool.folded() as averaged:
            judge("average", passed(averaged))
        members = [features.half() for features in _members(pool, passed)]
        for k, drawn in zip(shots, sets, strict=True):
            accuracies[k, "ensemble"] = ensemble_accuracy(members, drawn)
        with pool.randomized(seed).folded() as random:
            judge("random", passed(random))
    if model is not None:
        judge("meta-lora", passed(model.backbone), metric=model.head.metric)
    bar.close()
    rows, notes = [], []
    for k, drawn in zip(shots, sets, strict=True):
        rows += summarise({m: v for (s, m), v in accuracies.items() if s == k}, data.name, ways, k)
        notes += drawn.notes
    return Evaluation(rows, accuracies, notes)


def _bare(model: MetaLoRAForFewShotClassification) -> Backbone:
    """The model's own backbone once more, without the meta-LoRA."""
    config = model.peft_model.peft_config["default"]
    return Backbone.from_pretrained(config.base_model_name_or_path, revision=config.revision, device=model.device)


def _members(pool: AdapterPool, passed) -> Iterator[torch.Tensor]:
    for i in range(len(pool)):
        with pool.folded(i) as network:
            yield passed(network)


def find_pool(model_path: str | Path, pool: str | Path | None) -> str | Path | None:
    """The pool to compare with: the one given, or for the embedded meta-LoRA the embedded pool."""
    from ..embedded import pool_path

    return pool_path() if pool is None and str(model_path) == "demo" else pool
