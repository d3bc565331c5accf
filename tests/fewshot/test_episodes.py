"""Episodes repeat with the seed, never overlap, and say where the data was too small."""

import re

import pytest
import torch

from lora_recycle.errors import ConfigError, DataError
from lora_recycle.fewshot.episodes import sample_episodes


def labels_of(*sizes: int) -> torch.Tensor:
    return torch.cat([torch.full((size,), label) for label, size in enumerate(sizes)])


def test_shapes_labels_and_no_overlap():
    labels = labels_of(20, 20, 20, 20, 20, 20)
    drawn = sample_episodes(labels, ways=5, shots=3, queries=4, episodes=30, seed=0)
    assert len(drawn) == 30 and drawn.notes == []
    for episode in drawn:
        assert episode.support.shape == (5, 3) and episode.query.shape == (20,)
        assert torch.equal(labels[episode.support], episode.classes[:, None].expand(5, 3))
        assert torch.equal(labels[episode.query], episode.classes[episode.query_labels])
        assert len(episode.classes.unique()) == 5
        assert len(torch.cat([episode.support.flatten(), episode.query]).unique()) == 35


def test_same_seed_same_episodes():
    labels = labels_of(10, 10, 10)
    first, again, other = (sample_episodes(labels, 2, 1, 5, 8, seed) for seed in (0, 0, 1))
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one.support, two.support) and torch.equal(one.query, two.query)
    assert any(not torch.equal(one.support, two.support) for one, two in zip(first, other, strict=True))


def test_small_classes_give_fewer_queries_or_are_left_out():
    labels = labels_of(30, 9, 7, 5)
    drawn = sample_episodes(labels, 3, 5, 15, 4, seed=0, label_names=["a", "b", "c", "d", "e"], name="chestx")
    assert drawn.notes == [
        "chestx: 2 classes have fewer than 5 + 15 images: fewer queries, 2 at least.",
        "chestx: class 'd' has 5 images, fewer than 5 + 1: left out.",
        "chestx: class 'e' has 0 images, fewer than 5 + 1: left out.",
    ]
    for episode in drawn:
        asked = episode.query_labels.bincount(minlength=3)
        given = dict(zip(episode.classes.tolist(), asked.tolist(), strict=True))
        assert given == {0: 15, 1: 4, 2: 2}


def test_many_classes_left_out_are_counted():
    drawn = sample_episodes(labels_of(*[10] * 2, *[1] * 8), 2, 1, 5, 2, seed=0)
    assert len(drawn.notes) == 6 and "3 more classes" in drawn.notes[-1]


def test_too_few_classes_or_images():
    with pytest.raises(DataError, match="need 5 classes of at least 5 . 1 images, found 2 such classes among 3"):
        sample_episodes(labels_of(10, 10, 4), 5, 5, 15, 600, seed=0)


@pytest.mark.parametrize(
    ("sizes", "ways", "shots", "said"),
    [
        ((5, 5, 5, 5), 5, 1, "Ask for at most 4 ways."),
        ((5, 5, 5, 5), 4, 5, "Ask for at most 4 shots."),
        ((9, 9, 4), 3, 5, "Ask for at most 2 ways or 3 shots."),
        ((9, 2), 2, 3, "Ask for at most 1 shot."),
        ((9, 1), 2, 1, "Add classes, or images of each."),
    ],
)
def test_what_the_images_would_do_for_is_said(sizes, ways, shots, said):
    with pytest.raises(DataError, match=re.escape(said)):
        sample_episodes(labels_of(*sizes), ways, shots, 15, 600, seed=0)


@pytest.mark.parametrize(
    "ways, shots, queries, episodes, message",
    [
        (1, 1, 1, 5, "a support set of one class"),
        (2, 0, 1, 5, "at least 1, got 0 and 1"),
        (2, 1, 0, 5, "at least 1, got 1 and 0"),
        (2, 1, 1, 1, "episodes must be at least 2"),
    ],
)
def test_impossible_numbers(ways, shots, queries, episodes, message):
    with pytest.raises(ConfigError, match=message):
        sample_episodes(labels_of(9, 9), ways, shots, queries, episodes, seed=0)
