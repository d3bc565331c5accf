"""What every few-shot head does: gather statistics of a support set, prepare them once, score queries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F


Tensors = dict[str, torch.Tensor]


class FewShotHead:
    """A head that needs the sum of each class's embeddings and their number, as most do.

    All tensors may have leading dimensions (...), one for each of many tasks at once. A support set is known to the
    head by its statistics alone, so that images can be added to a fitted task without seeing the earlier ones again:
    `merged` of the statistics of two parts is what the whole would have given, in whatever order they come.
    """

    #: what the head is called in sidecars and on the command line
    name: ClassVar[str]
    #: True where the score of a query depends on the other queries
    transductive: ClassVar[bool] = False
    #: the statistics and their shapes, in letters: C classes, D wide, N support images
    statistics_shapes: ClassVar[Mapping[str, str]] = {"sums": "CD", "counts": "C"}

    @classmethod
    def from_settings(cls, trained: Mapping[str, Any], parameters: Mapping[str, Any]) -> FewShotHead:
        """Make the head from what the meta-LoRA was `trained` with and the head's own fitted `parameters`."""
        return cls(**parameters)

    def parameters(self) -> dict[str, Any]:
        """What [`fit_head`] learns, under the names that `__init__` takes: positive numbers, or lists of them."""
        return {}

    def statistics(self, features: torch.Tensor, labels: torch.Tensor, num_classes: int) -> Tensors:
        """Statistics of a support set.

        Args:
            features: (..., N, D).
            labels: int64 (..., N), values 0 to `num_classes` - 1.
        """
        members = F.one_hot(labels, num_classes).to(features.dtype)  # (..., N, C)
        return {"sums": members.mT @ features, "counts": members.sum(-2)}

    def merged(self, earlier: Tensors, later: Tensors) -> Tensors:
        """Statistics of two parts of a support set taken together.

        Args:
            earlier: may know fewer classes than `later`: the first of its.
        """
        classes = len(later["counts"])
        return {name: value + with_classes(earlier[name].to(value), classes) for name, value in later.items()}

    def prototypes(self, statistics: Tensors) -> torch.Tensor:
        """Mean embedding of each class: (..., C, D)."""
        return statistics["sums"] / statistics["counts"].clamp_min(1)[..., None]

    def prepare(self, statistics: Tensors) -> Tensors:
        """What scoring needs of the support set, computed once for many queries."""
        raise NotImplementedError

    def logits(self, features: torch.Tensor, prepared: Tensors) -> torch.Tensor:
        """Scores of queries: (..., Q, D) to (..., Q, C). A transductive head takes the Q queries as one set."""
        raise NotImplementedError

    def classify(
        self, support: torch.Tensor, labels: torch.Tensor, num_classes: int, query: torch.Tensor
    ) -> torch.Tensor:
        """Support (..., N, D) with labels (..., N), and queries (..., Q, D), to scores (..., Q, C)."""
        return self.logits(query, self.prepare(self.statistics(support, labels, num_classes)))


class LinearHead(FewShotHead):
    """A head whose scores are linear in the embedding of unit length: `prepare` gives weights and a bias."""

    def logits(self, features: torch.Tensor, prepared: Tensors) -> torch.Tensor:
        return unit(features) @ prepared["weights"] + prepared["bias"]


class ImagesHead(FewShotHead):
    """A head that needs each support image, not their sums: a fitted task keeps all embeddings, of unit length."""

    statistics_shapes = {"features": "ND", "labels": "N"}

    def statistics(self, features: torch.Tensor, labels: torch.Tensor, num_classes: int) -> Tensors:
        return {"features": unit(features), "labels": labels}

    def merged(self, earlier: Tensors, later: Tensors) -> Tensors:
        return {name: torch.cat([earlier[name].to(value), value]) for name, value in later.items()}

    def prototypes(self, statistics: Tensors) -> torch.Tensor:
        """Mean of each class's unit embeddings, shorter than 1 where they differ: (..., C, D)."""
        features, labels = statistics["features"], statistics["labels"]
        return super().prototypes(super().statistics(features, labels, int(labels.max()) + 1))


class TransductiveHead(ImagesHead):
    """A head that lets the queries say how they lie to each other and to the support images, all of unit length."""

    transductive = True

    def prepare(self, statistics: Tensors) -> Tensors:
        prototypes = self.prototypes(statistics)  # (..., C, D)
        members = F.one_hot(statistics["labels"], prototypes.shape[-2]).to(prototypes.dtype)  # (..., N, C)
        return {"prototypes": prototypes, "support": statistics["features"], "members": members}


def unit(features: torch.Tensor) -> torch.Tensor:
    """Embeddings of unit length, in float32."""
    return F.normalize(features.float(), dim=-1)


def with_classes(value: torch.Tensor, num_classes: int) -> torch.Tensor:
    """A statistic whose first dimension is the class, with zeros for the classes that it did not know."""
    missing = value.new_zeros(num_classes - len(value), *value.shape[1:])
    return torch.cat([value, missing])
