"""Episodes of surrogate images: one source or mixed, never the same thing twice."""

import pytest
import torch

from lora_recycle.distillation.episodes import EpisodeSampler, class_identities
from lora_recycle.errors import DataError
from lora_recycle.surrogate import Shard


def shard(name, labels, num_classes=3, each=4):
    count = num_classes * each
    return Shard(
        {"name": name, "sha256": name, "labels": labels},
        torch.zeros(count, 3, 8, 8, dtype=torch.uint8),
        torch.arange(num_classes).repeat_interleave(each),
        torch.zeros(count, num_classes),
        torch.zeros(count, 5).half(),
    )


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


ANIMALS = [shard("a", ["cat", "Polar bear", "bird"]), shard("b", ["fish", "CAT", "polar_bear"])]


def test_classes_of_one_name_are_one_thing():
    identity = class_identities(ANIMALS)
    assert identity[0, 0] == identity[1, 1] and identity[0, 1] == identity[1, 2]
    assert len(set(identity.values())) == 4


def test_two_classes_of_one_adapter_stay_apart():
    identity = class_identities([shard("a", None), shard("b", None)])
    assert len(set(identity.values())) == 6


def test_without_names_the_teachers_decide():
    shards = [shard("a", None), shard("b", None)]
    predictions = torch.zeros(2, 24, dtype=torch.int16)
    predictions[0, :12], predictions[1, 12:] = shards[0].labels, shards[1].labels
    predictions[0, 12:] = torch.tensor([2, 2, 2, 0] + [1] * 8)  # b's class 0 is a's class 2, mostly
    predictions[1, :12] = torch.tensor([1] * 8 + [0, 0, 0, 2])  # and a's class 2 is b's class 0
    identity = class_identities(shards, predictions)
    assert identity[0, 2] == identity[1, 0] and identity[0, 1] == identity[1, 1]
    assert identity[0, 0] != identity[1, 1]  # one-sided agreement is none
    assert len(set(identity.values())) == 4


def test_named_classes_are_matched_with_nameless_ones_by_agreement_only():
    shards = [shard("a", ["x", "y", "z"]), shard("b", ["u", "v", "w"]), shard("c", None)]
    everyone = torch.arange(3).repeat_interleave(4).repeat(3).repeat(3, 1).to(torch.int16)
    identity = class_identities(shards, everyone)
    assert len({identity[0, c] for c in range(3)} | {identity[1, c] for c in range(3)}) == 6  # names win
    assert [identity[2, c] for c in range(3)] == [identity[0, c] for c in range(3)]


def test_images_outside_of_a_group_agree_with_nobody():
    shards = [shard("a", None), shard("b", None)]
    identity = class_identities(shards, torch.full((2, 24), -1, dtype=torch.int16))
    assert len(set(identity.values())) == 6


def test_single_source_episodes_come_from_one_adapter():
    sampler, sources = EpisodeSampler(ANIMALS, class_identities(ANIMALS), ways=2, shots=1, queries=2), set()
    labels = torch.cat([s.labels for s in ANIMALS])
    draw = generator()
    for _ in range(20):
        episode = sampler.single_source(draw)
        sources.add(episode.source)
        assert episode.support.shape == (2, 1) and episode.query.shape == (2, 2) and episode.classes.shape == (2,)
        rows = torch.cat([episode.support, episode.query], 1)
        assert (rows // 12 == episode.source).all()
        assert torch.equal(labels[rows], episode.classes[:, None].expand(2, 3))
        assert len(rows.unique()) == 6 and len(episode.classes.unique()) == 2
    assert sources == {0, 1}


def test_interpolated_episodes_never_hold_a_thing_twice():
    identity = class_identities(ANIMALS)
    sampler = EpisodeSampler(ANIMALS, identity, ways=4, shots=1, queries=2)
    draw, mixed = generator(), 0
    for _ in range(30):
        episode = sampler.interpolated(draw)
        rows = torch.cat([episode.support, episode.query], 1)
        owners = [(row // 12, (row % 12) // 4) for row in rows.tolist() for row in row]
        things = [identity[key] for key in owners]
        assert len(set(things)) == 4 and all(len(set(things[i : i + 3])) == 1 for i in range(0, 12, 3))
        assert len(rows.unique()) == 12 and episode.source is None and episode.classes is None
        mixed += len({s for s, _ in owners}) == 2
    assert mixed == 30  # four things need both adapters


def test_fewer_images_mean_fewer_queries():
    sampler = EpisodeSampler(ANIMALS, class_identities(ANIMALS), ways=2, shots=3, queries=15)
    assert sampler.interpolated(generator()).query.shape == (2, 1)


def test_same_generator_same_episode():
    sampler = EpisodeSampler(ANIMALS, class_identities(ANIMALS), ways=3, shots=1, queries=2)
    for draw in (sampler.interpolated, sampler.single_source):
        one, same, other = draw(generator(1)), draw(generator(1)), draw(generator(2))
        assert torch.equal(one.query, same.query) and not torch.equal(one.query, other.query)


def test_too_few_classes_or_images():
    identity = class_identities(ANIMALS)
    with pytest.raises(DataError, match="4 different classes of 2 images or more, fewer than the 5"):
        EpisodeSampler(ANIMALS, identity, ways=5, shots=1, queries=2)
    with pytest.raises(DataError, match="0 different classes of 5 images or more"):
        EpisodeSampler(ANIMALS, identity, ways=2, shots=4, queries=2)
    wide = EpisodeSampler(ANIMALS, identity, ways=4, shots=1, queries=2)
    with pytest.raises(DataError, match="No adapter has 4 classes of 2 surrogate images or more"):
        wide.single_source(generator())
