"""Class-statistics matching finds the adapter of the task's classes, and asks no more adapters than it must."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from helpers_tiny import planted_adapter, random_factors, tiny_backbone

from lora_recycle.adapters.heads import Head, PooledHead, TextHead
from lora_recycle.backbones.backbone import extract_features
from lora_recycle.errors import AdapterError
from lora_recycle.merging import ClassStatistics
from lora_recycle.merging.base import _scores
from lora_recycle.merging.class_statistics import class_directions, match
from lora_recycle.pool.pool import AdapterPool


Q0, LABELS = "layers.0.attention.q_proj", torch.tensor([0, 1, 0, 1, 0, 1])


@pytest.fixture
def owned(images):
    """Four adapters; the head of each was made of the features that it gives to its own six images, `images[t]`.

    They change so little that the bare backbone sees an adapter's images much as it does, and its head matches best.
    """
    generator = torch.Generator().manual_seed(1)
    sets = [images] + [torch.randint(0, 256, images.shape, generator=generator, dtype=torch.uint8) for _ in range(3)]
    factors = [random_factors({Q0: (32, 4, 32)}, seed=t, scale=0.1) for t in range(4)]
    adapters = [planted_adapter(f"a{t}", own) for t, own in enumerate(factors)]
    pool, owners = AdapterPool(tiny_backbone(), adapters), []
    for t, own in enumerate(sets):
        with pool.folded(t) as backbone:
            features = extract_features(backbone, own)
        # rows of another scale, and with a part that they all share
        owners.append(adapters[t].with_head(Head((t + 1.0) * (features - features.mean(0)) + 5 * t)))
    return AdapterPool(pool.backbone, owners), sets


@pytest.mark.parametrize("owner", range(4))
def test_a_task_of_an_adapters_classes_chooses_that_adapter(owned, owner):
    pool, sets = owned
    networks, asked = list(ClassStatistics().networks(pool)), []

    def look(number):
        asked.append(number)
        with networks[number] as backbone:
            return extract_features(backbone, sets[owner])

    assert ClassStatistics().choice(pool)(look, LABELS) == 1 + owner
    assert len(networks) == 5 and asked[0] == 0 and len(asked) == len(set(asked)) < 5
    queries = sets[owner].flip(0)
    expected = _scores(pool.folded(owner), sets[owner], LABELS, queries, 8)
    torch.testing.assert_close(ClassStatistics().classify(pool, sets[owner], LABELS, queries), expected)
    another = _scores(pool.folded((owner + 1) % 4), sets[owner], LABELS, queries, 8)
    assert (another - expected).abs().max() > 1e-2


def seen_as(seen):
    """Features that match the classes of adapter `seen[n]` under network n, of a pool of one-class-pair heads."""
    axes = torch.eye(32)
    return lambda number: torch.stack([axes[seen[number]], -axes[seen[number]]])


@pytest.fixture
def axes():
    """Adapter t tells two classes apart, along axis t."""
    heads = [Head(torch.stack([torch.eye(32)[t], -torch.eye(32)[t]])) for t in range(4)]
    adapters = [planted_adapter(f"a{t}", random_factors({Q0: (32, 1, 32)}, t)).with_head(heads[t]) for t in range(4)]
    return AdapterPool(tiny_backbone(), adapters)


def test_the_choice_is_refined_until_it_stands(axes):
    choose, seen, asked = ClassStatistics().choice(axes), seen_as({0: 3, 4: 1, 2: 2, 3: 2}), []
    # the backbone says 3, adapter 3 (network 4) says 1, adapter 1 (network 2) says 2, which says itself
    assert choose(lambda number: asked.append(number) or seen(number), LABELS) == 3
    assert asked == [0, 4, 2, 3]


def test_of_a_circle_the_one_that_matches_itself_best_is_taken(axes):
    eye = torch.eye(32)
    views = {
        0: eye[3],
        4: eye[1],  # adapter 3 is on the way, not in the circle
        2: eye[2] + 0.9 * eye[1],  # 1 says 2, but nearly itself
        3: eye[1] + 0.1 * eye[2],  # 2 says 1
    }
    choose = ClassStatistics().choice(axes)
    assert choose(lambda number: torch.stack([views[number], -views[number]]), LABELS) == 2


def test_match_by_hand():
    features = torch.tensor([[4.0, 5.0], [2.0, 5.0], [3.0, 7.0], [3.0, 3.0]])  # less (3, 5): along the axes
    directions = F.normalize(torch.tensor([[3.0, 4.0], [-1.0, 0.0]]), dim=1)
    assert match(features, directions).item() == pytest.approx((0.6 + 1.0 + 0.8 + 0.0) / 4)


def test_class_directions_of_every_head_that_reads_the_feature(axes):
    adapter, backbone, weight = axes[0], axes.backbone, torch.randn(3, 32)
    rows = F.normalize(weight - weight.mean(0), dim=1)
    shifted = adapter.with_head(Head(7 * weight + torch.arange(32.0)))
    torch.testing.assert_close(class_directions(shifted, backbone), rows)
    wide = adapter.with_head(Head(torch.cat([weight, torch.randn(3, 32)], 1)))  # CLS and the mean patch
    torch.testing.assert_close(class_directions(wide, backbone), rows)
    projection = torch.randn(16, 32)
    text = adapter.with_head(TextHead(torch.randn(3, 16), projection=projection))
    expected = (text.head.weight - text.head.weight.mean(0)) @ projection
    torch.testing.assert_close(class_directions(text, backbone), F.normalize(expected, dim=1), atol=1e-5, rtol=1e-4)


def test_heads_that_say_nothing_of_the_feature_are_refused(axes, mixed):
    with pytest.raises(AdapterError, match="a0: has no classification head.*pool.subset"):
        ClassStatistics().choice(mixed)
    backbone = tiny_backbone()
    backbone.family = dataclasses.replace(backbone.family, head_input="patches")
    with pytest.raises(AdapterError, match="a0: its head reads the mean patch"):
        class_directions(axes[0], backbone)
    class_directions(axes[0].with_head(PooledHead(torch.randn(3, 32))), backbone)
