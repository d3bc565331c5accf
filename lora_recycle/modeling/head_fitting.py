"""Parameters of heads learned on surrogate episodes: no real image is needed."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F

from ..backbones.backbone import extract_features
from ..errors import ConfigError, DataError
from ..fewshot.heads.base import FewShotHead
from ..surrogate.dataset import SurrogateDataset


if TYPE_CHECKING:
    from .meta_lora import MetaLoRAForFewShotClassification

EPISODES_A_STEP = 8
LEARNING_RATE = 0.05
QUERIES = 15
SURE = 0.5  # an image counts as what its own adapter takes it for with at least this probability

Classes = list[torch.Tensor]  # of one adapter: the embeddings (N, D) of each class
#: What `_episode` gives.
Episode = tuple[torch.Tensor, torch.Tensor, int, torch.Tensor, torch.Tensor]


def fit_head(
    model: MetaLoRAForFewShotClassification,
    surrogate: SurrogateDataset,
    *,
    ways: int = 5,
    shots: int = 1,
    steps: int = 100,
    seed: int = 0,
) -> FewShotHead:
    """Learn the parameters of the model's head (a temperature, or those of unrolled EM) on surrogate episodes.

    Cross-entropy of the queries by Adam, on the logarithms of the parameters, so that they stay positive. The model
    wears the new head, and `save_pretrained` writes its parameters into the sidecar, from where
    [`fewshot.heads.make_head`] takes them. The classes of an episode are those of one adapter, an image's class is
    what that adapter's own head takes it for, and images of which it is not sure are left out. How well parameters
    carry over to real images hangs on how real the surrogates are: compare on validation data where there is some.

    Args:
        ways: classes of an episode.
        shots: support images of each class, with up to 15 queries.
        steps: of 8 episodes each.

    Returns:
        The head with its new parameters, which is `model.head` now.

    Raises:
        ConfigError: the head has nothing to learn.
        DataError: no adapter has `ways` classes of `shots` + 1 surrogate images that show them.
    """
    head = copy.copy(model.head)
    start = head.parameters()
    if not start:
        raise ConfigError(f"The head {head.name} has no parameters to learn.")
    sources = _embedded_classes(model, surrogate, ways, shots)
    learned = {name: torch.tensor(value).log().requires_grad_() for name, value in start.items()}
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(learned.values(), lr=LEARNING_RATE)
    for _ in range(steps):
        _wear(head, {name: value.exp() for name, value in learned.items()})
        episodes = [_episode(sources, ways, shots, generator) for _ in range(EPISODES_A_STEP)]
        losses = [F.cross_entropy(head.classify(*episode[:-1]), episode[-1]) for episode in episodes]
        optimizer.zero_grad()
        (cast(torch.Tensor, sum(losses)) / len(losses)).backward()
        optimizer.step()
    parameters = {name: value.detach().exp().tolist() for name, value in learned.items()}
    _wear(head, parameters)
    model.settings["head_parameters"] = {**model.settings.get("head_parameters", {}), head.name: parameters}
    model.head = head
    return head


def _wear(head: FewShotHead, parameters: dict) -> None:
    for name, value in parameters.items():
        setattr(head, name, value)


def _embedded_classes(
    model: MetaLoRAForFewShotClassification, surrogate: SurrogateDataset, ways: int, shots: int
) -> list[Classes]:
    """Adapters with enough classes, read shard by shard."""
    sources = []
    for i in range(surrogate.num_shards):
        shard = surrogate.shard(i)
        features = extract_features(model.backbone, shard.pixels)
        sure, shown = shard.teacher_logits.softmax(1).max(1)
        classes = [features[(shown == c) & (sure >= SURE)] for c in shown.unique().tolist()]
        classes = [members.clone() for members in classes if len(members) > shots]  # no inference tensors
        if len(classes) >= ways:
            sources.append(classes)
    if not sources:
        raise DataError(
            f"{surrogate.folder}: no adapter has {ways} classes of {shots} + 1 surrogate images that it recognises. "
            "Ask for fewer ways or shots, or invert more images of each class."
        )
    return sources


def _episode(sources: list[Classes], ways: int, shots: int, generator: torch.Generator) -> Episode:
    """Support (ways x shots, D), its labels, `ways`, queries (Q, D) and their labels, from one adapter."""
    classes = sources[int(torch.randint(len(sources), (1,), generator=generator))]
    support, query, labels = [], [], []
    for way, c in enumerate(torch.randperm(len(classes), generator=generator)[:ways].tolist()):
        order = torch.randperm(len(classes[c]), generator=generator)[: shots + QUERIES]
        support.append(classes[c][order[:shots]])
        query.append(classes[c][order[shots:]])
        labels.append(torch.full((len(order) - shots,), way))
    shown = torch.arange(ways).repeat_interleave(shots)
    return torch.cat(support), shown, ways, torch.cat(query), torch.cat(labels)
