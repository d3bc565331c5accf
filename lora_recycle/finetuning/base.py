"""What all tuning on a support set shares: a network that goes back to its start, and the loop that tunes it."""

from __future__ import annotations

import abc
import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F

from ..backbones.backbone import Backbone
from ..errors import DataError
from ..fewshot.prototypes import class_prototypes, prototype_logits
from ..pool.pool import AdapterPool
from .config import TaskTuningConfig


class TaskNetwork:
    """A network of which some parameters learn a task, and `reset` takes them back to where every task begins.

    Args:
        backbone ([`Backbone`]): may wear an adapter.
        parameters: those that learn. They lie in the last layers.
        last_layers (`int`, *optional*): how many layers learn; 0 for none, None for all.
        worn: what the backbone wears during a forward.
    """

    def __init__(
        self,
        backbone: Backbone,
        parameters: Iterable[torch.Tensor] = (),
        last_layers: int | None = None,
        worn: Callable[[], AbstractContextManager] = contextlib.nullcontext,
    ):
        depth = len(backbone.layers)
        self.backbone, self.parameters, self.worn = backbone, list(parameters), worn
        self.first_layer = 0 if last_layers is None else max(0, depth - last_layers)
        self._start = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def reset(self) -> None:
        for parameter, value in zip(self.parameters, self._start, strict=True):
            parameter.copy_(value)

    @contextlib.contextmanager
    def learning(self) -> Iterator[list[torch.Tensor]]:
        """The parameters, which want gradients meanwhile."""
        wanted = [parameter.requires_grad for parameter in self.parameters]
        try:
            with torch.enable_grad():
                yield [parameter.requires_grad_(True) for parameter in self.parameters]
        finally:
            for parameter, before in zip(self.parameters, wanted, strict=True):
                parameter.requires_grad_(before)
                parameter.grad = None

    @torch.no_grad()
    def tokens(self, images: torch.Tensor, batch_size: int = 128) -> torch.Tensor:
        """What no tuning changes: the tokens that enter the first layer that learns, or the features where none does.

        Args:
            images: (N, 3, H, W), uint8 or normalised.

        Returns:
            (N, T, D), or features (N, D), on the CPU.
        """
        parts = []
        with self.worn():
            for part in images.split(batch_size):
                pixel_values = self.backbone.normalize(part) if part.dtype == torch.uint8 else part
                pixel_values = pixel_values.to(self.backbone.device)
                if self.first_layer == len(self.backbone.layers):
                    parts.append(self.backbone.features(pixel_values).float().cpu())
                else:
                    parts.append(self.backbone.tokens_entering(self.first_layer, pixel_values).cpu())
        return torch.cat(parts)

    def features(self, tokens: torch.Tensor) -> torch.Tensor:
        """What the network as tuned so far makes of `tokens`: (N, D) float32, on its device."""
        tokens = tokens.to(self.backbone.device)
        if self.first_layer == len(self.backbone.layers):
            return tokens
        with self.worn():
            return self.backbone.features_from(tokens, self.first_layer).float()


def tune_task(
    network: TaskNetwork, tokens: torch.Tensor, labels: torch.Tensor, ways: int, config: TaskTuningConfig
) -> torch.Tensor:
    """Tune a network and its prototypes on a support set, from the network's start and its own prototypes.

    Cross-entropy of the support images against the prototypes. With `leave_one_out` the prototypes stay the mean
    embeddings, and each image is scored by them without itself, as a query would be; an image that is alone in its
    class cannot be, and where all are, nothing is tuned. With `consistency`, embeddings are also held to those of the
    untuned network: one minus their cosine similarity, as CoPrompt (arXiv 2306.01195) holds a prompted model to the
    pre-trained one. Adam, no weight decay.

    Args:
        tokens: (S, T, D) of `network.tokens`, or features (S, D).
        labels: int64 (S,), values 0 to `ways` - 1, each present.

    Returns:
        The prototypes, (ways, D), on the network's device. The network stays tuned until its `reset`.
    """
    network.reset()
    labels = labels.to(network.backbone.device)
    with torch.no_grad():
        untuned = network.features(tokens)
    start = class_prototypes(untuned, labels, ways)
    scored = (
        torch.bincount(labels, minlength=ways)[labels] > 1 if config.leave_one_out else torch.ones_like(labels) > 0
    )
    if not scored.any() or (config.leave_one_out and not network.parameters):
        return start
    size, moved = start.square().mean().sqrt(), torch.zeros_like(start, requires_grad=True)
    with network.learning() as parameters:
        groups = [{"params": parameters, "lr": config.lr}] if parameters else []
        optimizer = torch.optim.Adam([*groups, {"params": [moved], "lr": config.head_lr}])
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: _decay(i, config.steps))
        for _ in range(config.steps):
            features = network.features(tokens)
            if config.leave_one_out:
                logits = leave_one_out_logits(features, labels, ways, config.metric, config.temperature)
            else:
                logits = prototype_logits(features, start + size * moved, config.metric, config.temperature)
            loss = F.cross_entropy(logits[scored], labels[scored])
            if config.consistency:
                loss = loss + config.consistency * (1 - F.cosine_similarity(features, untuned)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    if config.leave_one_out:
        with torch.no_grad():
            return class_prototypes(network.features(tokens), labels, ways)
    return (start + size * moved).detach()


def leave_one_out_logits(
    features: torch.Tensor, labels: torch.Tensor, ways: int, metric: str = "cosine", temperature: float = 0.1
) -> torch.Tensor:
    """Scores of support images against prototypes, of which each image's own is made without it, if its class has
    others.

    Args:
        features: (S, D).
        labels: int64 (S,), values 0 to `ways` - 1, each present.

    Returns:
        (S, ways).
    """
    counts = torch.bincount(labels, minlength=ways).to(features)[labels, None]  # (S, 1)
    prototypes = class_prototypes(features, labels, ways)
    logits = prototype_logits(features, prototypes, metric, temperature)
    own = torch.where(
        counts > 1, (prototypes[labels] * counts - features) / (counts - 1).clamp_min(1), prototypes[labels]
    )
    if metric == "euclidean":
        without = -torch.linalg.vector_norm(features - own, dim=1) / temperature
    else:
        without = F.cosine_similarity(features, own) / temperature
    return logits.scatter(1, labels[:, None], without[:, None])


def _decay(step: int, steps: int) -> float:
    return 0.5 + 0.5 * math.cos(math.pi * step / max(1, steps))


class TaskTuning(abc.ABC):
    """A few-shot method that tunes on the support set of each task.

    Args:
        config ([`TaskTuningConfig`], *optional*): the method's own by default.
    """

    #: settings that differ from `TaskTuningConfig`'s
    defaults: dict = {}

    def __init__(self, config: TaskTuningConfig | None = None):
        self.config = config or TaskTuningConfig(**self.defaults)

    @abc.abstractmethod
    def network(self, pool: AdapterPool) -> TaskNetwork:
        """The network in the state in which every task begins. It is made once for many tasks."""

    def tune(self, network: TaskNetwork, tokens: torch.Tensor, labels: torch.Tensor, ways: int) -> torch.Tensor:
        """Tune on one support set, as [`tune_task`] does."""
        return tune_task(network, tokens, labels, ways, self.config)

    def scores(
        self, network: TaskNetwork, tokens: torch.Tensor, labels: torch.Tensor, ways: int, queries: torch.Tensor
    ) -> torch.Tensor:
        """Tune on the support set's `tokens` and score the tokens of the queries: (Q, ways) on the CPU."""
        prototypes = self.tune(network, tokens, labels, ways)
        with torch.no_grad():
            logits = prototype_logits(
                network.features(queries), prototypes, self.config.metric, self.config.temperature
            )
        return logits.cpu()

    def classify(
        self, pool: AdapterPool, support: torch.Tensor, labels: torch.Tensor, queries: torch.Tensor
    ) -> torch.Tensor:
        """Scores of one task's queries. The pool's backbone stays as it is.

        Args:
            support (`torch.Tensor`): uint8 (S, 3, H, W).
            labels (`torch.Tensor`): int64 (S,), values 0 to C - 1, each present.
            queries (`torch.Tensor`): uint8 (Q, 3, H, W).

        Returns:
            `torch.Tensor`: (Q, C), the higher the likelier.

        Raises:
            DataError: labels that do not number 0 to C - 1, or another number of them than of images.
            AdapterError: an adapter changes no weights, and the method needs changes.
        """
        classes = labels.unique().tolist()
        if len(labels) != len(support) or len(classes) < 2 or classes != list(range(len(classes))):
            raise DataError(
                f"{len(support)} support images need as many labels that number 2 or more classes 0, 1, ..., "
                f"got {len(labels)} with the values {classes}."
            )
        network = self.network(pool)
        return self.scores(network, network.tokens(support), labels, len(classes), network.tokens(queries))
