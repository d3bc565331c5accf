"""Few-shot heads: what turns the embeddings of a support set into scores of classes. One small class each, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import ConfigError
from .base import FewShotHead
from .discriminant import DiscriminantHead
from .information import InformationHead
from .laplacian import LaplacianHead
from .logistic import LogisticRegressionHead
from .prototypes import CosinePrototypeHead, EuclideanPrototypeHead, PrototypeHead
from .transport import TransportHead
from .unrolled_em import UnrolledEMHead


#: Every head by the name that sidecars, `from_pretrained(head=...)` and `--head` call it by.
HEADS: dict[str, type[FewShotHead]] = {
    head.name: head
    for head in (
        PrototypeHead,
        CosinePrototypeHead,
        EuclideanPrototypeHead,
        DiscriminantHead,
        LogisticRegressionHead,
        LaplacianHead,
        TransportHead,
        UnrolledEMHead,
        InformationHead,
    )
}


def make_head(name: str, settings: Mapping[str, Any]) -> FewShotHead:
    """The head of this name, with the parameters that a sidecar holds for it.

    Args:
        settings: of a sidecar: `metric` and `temperature`, which the meta-LoRA was trained with, and
            `head_parameters`, what [`fit_head`] learned, by the head's name.

    Raises:
        ConfigError: an unknown name, or parameters that the head does not take.
    """
    if name not in HEADS:
        raise ConfigError(f"Unknown head {name[:80]!r}. There are {', '.join(HEADS)}.")
    trained = {key: settings[key] for key in ("metric", "temperature") if key in settings}
    parameters = settings.get("head_parameters", {}).get(name, {})
    try:
        return HEADS[name].from_settings(trained, parameters)
    except (TypeError, AttributeError) as error:
        raise ConfigError(f"The head {name} cannot be made with {str(parameters)[:200]}: {error}.") from error


__all__ = [
    "HEADS",
    "CosinePrototypeHead",
    "DiscriminantHead",
    "EuclideanPrototypeHead",
    "FewShotHead",
    "InformationHead",
    "LaplacianHead",
    "LogisticRegressionHead",
    "PrototypeHead",
    "TransportHead",
    "UnrolledEMHead",
    "make_head",
]
