"""The experts of a mixed pool: for each domain the average of its adapters, beside the meta-LoRA of them all."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from typing import Any

import torch

from ..adapters.experts import ExpertEntry
from ..adapters.low_rank import cut
from ..adapters.trainable import adapted_layers, adapter_config, matrices, start_lora, wrap_seeded
from ..backbones.backbone import Backbone, extract_features
from ..errors import AdapterError
from ..fewshot.domains import SHARED, Expert
from ..fewshot.relations import cosine_similarity
from ..hub.embedded import backbone_name
from ..hub.repo_files import MAX_EXPERTS
from ..inversion.starts import PROCEDURES
from ..modeling.domains import DomainNetworks, ExpertNetwork, bare_copy
from ..pool.pool import AdapterPool


#: Procedural pictures that the bare backbone is shown, so many of each kind.
REFERENCE_KINDS, REFERENCE_COUNT = ("dead-leaves", "fractal", "strokes"), 128
_LEAST_NAME = 3
logger = logging.getLogger(__name__)


def pool_domains(pool: AdapterPool) -> list[tuple[Expert, list[int]]]:
    """The domains of a pool and the adapters of each; none of a pool of one group.

    The largest group is what the shared network serves best, and has no expert of its own: only its two halves have,
    where it falls into two. Of groups that are equally large each has one.
    """
    groups = pool.groups(MAX_EXPERTS // 2)
    if len(groups) < 2:
        return []
    found: list[tuple[str, list[int]]] = []
    if len(groups[0]) == len(groups[1]):
        found = [("group", group) for group in groups]
    else:
        halves = pool.halves(groups[0]) or []
        found = [*zip(("part", "compared"), halves, strict=False), *(("group", group) for group in groups[1:])]
    names = domain_names([[pool.infos[i].name for i in group] for _, group in found])
    return [
        (Expert(name, role, len(group) / len(pool)), group) for name, (role, group) in zip(names, found, strict=True)
    ]


def domain_names(groups: Iterable[list[str]]) -> list[str]:
    """A name for each group of adapters: what their names begin with, where that is a name and no other group's."""
    common = [os.path.commonprefix([name.split("/")[-1] for name in group]) for group in groups]
    common = [name.rstrip("0123456789-_. ")[:80] for name in common]
    return [
        name if len(name) >= _LEAST_NAME and common.count(name) == 1 and name != SHARED else f"domain-{number}"
        for number, name in enumerate(common, 1)
    ]


def reference_spread(backbone: Backbone) -> float:
    """How far a bare backbone spreads procedural pictures: 1 less the mean cosine similarity of all pairs."""
    generator = torch.Generator().manual_seed(0)
    features = []
    for kind in REFERENCE_KINDS:
        pictures = PROCEDURES[kind](REFERENCE_COUNT, backbone.image_size, generator)
        features.append(extract_features(backbone, (pictures * 255).round().to(torch.uint8)))
    similarity = cosine_similarity(torch.cat(features))
    return 1 - float((similarity.sum() - similarity.trace()) / (similarity.numel() - len(similarity)))


def expert_networks(pool: AdapterPool, worn: Backbone, rank: int) -> DomainNetworks | None:
    """The experts of a pool, on the weights of a backbone that wears the shared adapter; None of a pool of one group.

    Each is the exact average of its adapters' weight changes, cut to `rank`, a plain LoRA of scale 1 whatever the type
    of the shared adapter.
    """
    domains = pool_domains(pool)
    if not domains:
        return None
    bare = bare_copy(worn)
    try:
        networks = [_network(pool, expert, group, bare, rank) for expert, group in domains]
    except AdapterError as error:
        logger.warning("The meta-LoRA has no experts, because a group of its adapters has no average: %s", error)
        return None
    return DomainNetworks(bare, networks, reference_spread(bare))


@torch.no_grad()
def _network(pool: AdapterPool, expert: Expert, group: list[int], bare: Backbone, rank: int) -> ExpertNetwork:
    average = {name: cut(*factors, rank) for name, factors in pool.whole_averages(group)}
    own, width = bare_copy(bare), max(len(a) for _, a in average.values())
    config: Any = adapter_config("LORA", width, sorted(average), own, seed=0)
    config.base_model_name_or_path, config.revision = backbone_name(pool.backbone.name), pool.backbone.revision
    peft_model = wrap_seeded(own.model, config, 0)
    for name, layer in adapted_layers(own.model).items():
        matrices(layer)[0].zero_()  # of layers that need less than the rank nothing random stays
        start_lora(layer, *(factor.to(own.device) for factor in average[name]))
    adapters = [{"name": pool.infos[i].name, "sha256": pool.infos[i].sha256} for i in group]
    return ExpertNetwork(ExpertEntry(expert, adapters, {}), own, peft_model)
