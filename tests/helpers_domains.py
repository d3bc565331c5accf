"""A tiny pool of three domains, planted in the weights: the largest falls into two halves."""

import json

import torch
from helpers_tiny import planted_adapter, random_factors

from lora_recycle import DistillationConfig, MetaLoRAForFewShotClassification, MetaLoRATrainer
from lora_recycle.adapters.files import checksums
from lora_recycle.backbones.backbone import Backbone
from lora_recycle.pool.pool import AdapterPool


SHAPES = {"layers.0.attention.q_proj": (32, 2, 32), "layers.1.mlp.fc1": (64, 2, 32)}
#: The adapters of each domain, in the order of the experts.
MEMBERS = {"dogs": [0, 1, 2], "rest": [3, 4], "birds": [5, 6], "cars": [7, 8]}


def added(*parts):
    """The sum of changes, as factors."""
    return {
        module: (torch.cat([part[module][0] for part in parts], 1), torch.cat([part[module][1] for part in parts]))
        for module in SHAPES
    }


def domain_pool(backbone) -> AdapterPool:
    """Nine adapters: dogs and the rest share half of what they change, all others a tenth."""
    pets, dogs, rest, birds, cars = (random_factors(SHAPES, seed) for seed in range(5))
    common = random_factors(SHAPES, 5, 0.04)
    kinds = {"dogs": (pets, dogs), "rest": (pets, rest), "birds": (birds,), "cars": (cars,)}
    adapters = []
    for kind, members in MEMBERS.items():
        for member in members:
            own = random_factors(SHAPES, 100 + member, 0.03 if kind == "rest" else 0.01)
            adapters.append(planted_adapter(f"{kind}-{member}", added(common, *kinds[kind], own)))
    return AdapterPool(backbone, adapters)


def repair_expert(folder, number):
    """Make the sidecar fit an expert's files, as a hostile author would."""
    path = folder / "meta_lora_config.json"
    settings = json.loads(path.read_text())
    settings["domains"]["experts"][number - 1]["checksums"] = checksums(folder / "experts" / str(number))
    path.write_text(json.dumps(settings))


def mixed_model(path) -> MetaLoRAForFewShotClassification:
    """A meta-LoRA of that pool, with its experts, on the tiny backbone at `path`."""
    pool = domain_pool(Backbone.from_pretrained(path))
    return MetaLoRATrainer(pool, None, DistillationConfig(steps=0, rank=8, expert_rank=8)).to_model()
