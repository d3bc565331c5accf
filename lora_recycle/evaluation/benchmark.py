"""The same episodes for every method: what `lora-recycle evaluate` runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from tqdm.auto import tqdm

from ..backbones import Backbone, extract_features
from ..images import LabelledImages
from ..modeling.heads import FewShotHead, make_head
from ..modeling.meta_lora import MetaLoRAForFewShotClassification
from ..pool import AdapterPool
from .episodes import EpisodeSet, sample_episodes
from .protocol import ensemble_accuracy, head_accuracy, prototype_accuracy, summarise


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
    heads: Sequence[str] = (),
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
        heads: names of few-shot heads to judge too, on the frozen backbone and on the meta-LoRA (rows such as
            `meta-lora + lda`). The other rows are class centres. Queries of an episode are one set to a transductive
            head, which knows more than the other methods: compare it with its own kind.

    Raises:
        ConfigError: there is no head of a name.
        DataError: too few classes or images for an episode.
    """
    chosen = [make_head(name, model.settings if model else {}) for name in heads]
    names = data.label_names
    drawn = {k: sample_episodes(data.labels, ways, k, queries, episodes, seed, names, data.name) for k in shots}
    passes = 1 + (model is not None) + (len(pool) + 2 if pool else 0)
    bar = tqdm(total=passes, desc=f"evaluate {data.name}", unit="pass", disable=not progress)
    judge = _Judge(data, drawn, batch_size, bar)
    if backbone is None:
        backbone = pool.backbone if pool is not None else _bare(model)
    frozen = judge.features(backbone)
    judge.score("frozen", frozen)
    judge.score("frozen-centred", frozen, centred=True)
    judge.score_heads("frozen", frozen, chosen)
    if pool is not None:
        judge.score_pool(pool, seed)
    if model is not None:
        features = judge.features(model.backbone)
        judge.score("meta-lora", features, metric=model.settings.get("metric", "cosine"))
        judge.score_heads("meta-lora", features, chosen)
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

    def score(self, method: str, features: torch.Tensor, **options) -> None:
        for k, drawn in self.episodes.items():
            self.accuracies[k, method] = prototype_accuracy(features, drawn, **options)

    def score_heads(self, method: str, features: torch.Tensor, heads: Sequence[FewShotHead]) -> None:
        for head in heads:
            for k, drawn in self.episodes.items():
                self.accuracies[k, f"{method} + {head.name}"] = head_accuracy(features, drawn, head)

    def score_pool(self, pool: AdapterPool, seed: int) -> None:
        """The pool's exact average, the mean of its adapters' similarities, and the average of random adapters."""
        with pool.folded() as averaged:
            self.score("average", self.features(averaged))
        members = []
        for i in range(len(pool)):
            with pool.folded(i) as network:
                members.append(self.features(network).half())
        for k, drawn in self.episodes.items():
            self.accuracies[k, "ensemble"] = ensemble_accuracy(members, drawn)
        with pool.randomized(seed).folded() as random:
            self.score("random", self.features(random))


def _bare(model: MetaLoRAForFewShotClassification) -> Backbone:
    """The model's own backbone once more, without the meta-LoRA."""
    config = model.peft_model.peft_config["default"]
    return Backbone.from_pretrained(config.base_model_name_or_path, revision=config.revision, device=model.device)
