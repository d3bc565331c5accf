"""Pools of planted changes, small enough to be merged by hand."""

import pytest
import torch
from helpers_tiny import planted_adapter, random_factors, tiny_backbone

from lora_recycle.pool.pool import AdapterPool


Q0, FC1 = "layers.0.attention.q_proj", "layers.1.mlp.fc1"


@pytest.fixture
def mixed():
    """Three adapters of other ranks and targets, one of them with a change of a bias too."""
    shapes = [{Q0: (32, 2, 32)}, {Q0: (32, 5, 32), FC1: (64, 3, 32)}, {FC1: (64, 1, 32), Q0: (32, 32, 32)}]
    adapters = [planted_adapter(f"a{i}", random_factors(s, seed=i)) for i, s in enumerate(shapes)]
    adapters[1].vector_deltas["layers.0.layernorm_before.bias"] = torch.linspace(-1, 1, 32)
    return AdapterPool(tiny_backbone(), adapters)


@pytest.fixture
def planted():
    """A pool whose adapters change one layer by given dense matrices."""

    def build(*changes, module=Q0):
        adapters = [
            planted_adapter(f"a{i}", {module: (change, torch.eye(change.shape[1]))})
            for i, change in enumerate(changes)
        ]
        return AdapterPool(tiny_backbone(), adapters)

    return build


@pytest.fixture
def images():
    """uint8 (6, 3, 32, 32)."""
    return torch.randint(0, 256, (6, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
