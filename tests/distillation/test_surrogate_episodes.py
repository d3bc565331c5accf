"""Episodes of surrogate images: one source or mixed, never the same thing twice."""

import pytest
import torch
from helpers_tiny import ListedShard

from lora_recycle.distillation.episodes import EpisodeSampler, class_identities
from lora_recycle.distillation.surrogate_images import SurrogateImages
from lora_recycle.errors import DataError


def shard(name, labels, num_classes=3, each=4):
    return ListedShard({"name": name, "labels": labels}, torch.arange(num_classes).repeat_interleave(each))


def sampler_of(shards, **sizes):
    return EpisodeSampler(SurrogateImages(shards, []), class_identities(shards), **sizes)


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
    votes = {(t, t, c): c for t in range(2) for c in range(3)}
    votes |= {(0, 1, 0): 2, (0, 1, 1): 1, (0, 1, 2): 1}  # b's class 0 is a's class 2
    votes |= {(1, 0, 0): 1, (1, 0, 1): 1, (1, 0, 2): 0}  # and a's class 2 is b's class 0
    identity = class_identities(shards, votes)
    assert identity[0, 2] == identity[1, 0] and identity[0, 1] == identity[1, 1]
    assert identity[0, 0] != identity[1, 1]  # one-sided agreement is none
    assert len(set(identity.values())) == 4


def test_named_classes_are_matched_with_nameless_ones_by_agreement_only():
    shards = [shard("a", ["x", "y", "z"]), shard("b", ["u", "v", "w"]), shard("c", None)]
    everyone = {(t, s, c): c for t in range(3) for s in range(3) for c in range(3)}
    identity = class_identities(shards, everyone)
    assert len({identity[0, c] for c in range(3)} | {identity[1, c] for c in range(3)}) == 6  # names win
    assert [identity[2, c] for c in range(3)] == [identity[0, c] for c in range(3)]


def test_without_votes_of_both_nobody_agrees():
    shards = [shard("a", None), shard("b", None)]
    for one_sided in ({}, {(0, 1, c): c for c in range(3)}, {(1, 0, c): c for c in range(3)}):
        assert len(set(class_identities(shards, one_sided).values())) == 6


def test_single_source_episodes_come_from_one_adapter():
    sampler, sources = sampler_of(ANIMALS, ways=2, shots=1, queries=2), set()
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
    sampler = sampler_of(ANIMALS, ways=4, shots=1, queries=2)
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
    sampler = sampler_of(ANIMALS, ways=2, shots=3, queries=15)
    assert sampler.interpolated(generator()).query.shape == (2, 1)


def test_same_generator_same_episode():
    sampler = sampler_of(ANIMALS, ways=3, shots=1, queries=2)
    for draw in (sampler.interpolated, sampler.single_source):
        one, same, other = draw(generator(1)), draw(generator(1)), draw(generator(2))
        assert torch.equal(one.query, same.query) and not torch.equal(one.query, other.query)


def test_too_few_classes_or_images():
    with pytest.raises(DataError, match="4 different classes of 2 images or more, fewer than the 5"):
        sampler_of(ANIMALS, ways=5, shots=1, queries=2)
    with pytest.raises(DataError, match="0 different classes of 5 images or more"):
        sampler_of(ANIMALS, ways=2, shots=4, queries=2)
    wide = sampler_of(ANIMALS, ways=4, shots=1, queries=2)
    with pytest.raises(DataError, match="No adapter has 4 classes of 2 surrogate images or more"):
        wide.single_source(generator())
