"""Accuracies worked out by hand."""

import dataclasses
import math

import pytest
import torch

from lora_recycle.errors import ConfigError, DataError
from lora_recycle.evaluation.results import confidence, format_table, summarise
from lora_recycle.fewshot.accuracy import ensemble_accuracy, head_accuracy, prototype_accuracy
from lora_recycle.fewshot.episodes import Episode, EpisodeSet, sample_episodes
from lora_recycle.fewshot.heads import HEADS, make_head


def one_episode(support, query, query_labels) -> Episode:
    classes = torch.arange(len(support))
    return Episode(torch.tensor(support), torch.tensor(query), torch.tensor(query_labels), classes)


# Images 0-1: class 0 along x; 2-3: class 1 along y; 4-7: queries.
PLANE = torch.tensor([[1.0, 0], [3, 0], [0, 1], [0, 3], [5, 1], [1, 5], [4, 3], [0.5, 0.1]])


def test_cosine_by_hand():
    # prototypes (2, 0) and (0, 2): queries 4, 6 and 7 lie nearer x, 5 nearer y
    first = one_episode([[0, 1], [2, 3]], [4, 5, 6, 7], [0, 1, 0, 0])
    second = one_episode([[0, 1], [2, 3]], [4, 5, 6, 7], [0, 1, 1, 1])
    assert prototype_accuracy(PLANE, EpisodeSet([first, second], 2, 2)).tolist() == [100.0, 50.0]


def test_euclidean_and_cosine_differ_by_hand():
    # prototypes (1, 0) and (10, 1): query (4, 0.4) points along the second but lies nearer the first
    features = torch.tensor([[1.0, 0], [10, 1], [4, 0.4]])
    episodes = EpisodeSet([one_episode([[0], [1]], [2], [0])], 2, 1)
    assert prototype_accuracy(features, episodes, "euclidean").tolist() == [100.0]
    assert prototype_accuracy(features, episodes, "cosine").tolist() == [0.0]


def test_centring_by_hand():
    # a large common offset makes all directions alike; (10.9, 1.1) has the direction of the first prototype (10, 1)
    # but, seen from the mean (10.5, 1), lies on the side of the second (11, 1)
    features = torch.tensor([[10.0, 1], [11, 1], [10.9, 1.1]])
    episodes = EpisodeSet([one_episode([[0], [1]], [2], [1])], 2, 1)
    assert prototype_accuracy(features, episodes).tolist() == [0.0]
    assert prototype_accuracy(features, episodes, centred=True).tolist() == [100.0]


def test_ragged_queries_count_only_what_is_there():
    first = one_episode([[0, 1], [2, 3]], [4, 5, 6], [0, 1, 1])
    second = one_episode([[0, 1], [2, 3]], [5], [1])
    accuracy = prototype_accuracy(PLANE, EpisodeSet([first, second], 2, 2))
    assert accuracy.tolist() == pytest.approx([200 / 3, 100.0])


@pytest.fixture
def random_case():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(6).repeat(30)
    features = torch.randn(180, 8, generator=generator) + torch.randn(6, 8, generator=generator)[labels]
    return features, sample_episodes(labels, 5, 2, 10, 20, seed=0)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("centred", [False, True])
def test_same_as_a_plain_loop(random_case, monkeypatch, metric, centred):
    features, episodes = random_case
    monkeypatch.setattr("lora_recycle.fewshot.accuracy._CHUNK_ELEMENTS", 2000)  # several chunks
    expected = []
    for episode in episodes:
        shift = features[episode.support].mean((0, 1)) if centred else torch.zeros(8)
        prototypes = (features[episode.support] - shift).mean(1)
        query = features[episode.query] - shift
        if metric == "cosine":
            scores = torch.cosine_similarity(query[:, None], prototypes[None], dim=-1)
        else:
            scores = -(query[:, None] - prototypes[None]).square().sum(-1)
        expected.append(100 * (scores.argmax(1) == episode.query_labels).float().mean().item())
    accuracy = prototype_accuracy(features, episodes, metric, centred)
    assert accuracy.tolist() == pytest.approx(expected, abs=1e-3)


def test_ensemble_of_one_is_the_prototype(random_case):
    features, episodes = random_case
    features = features.half()
    assert torch.equal(ensemble_accuracy(features[None], episodes), prototype_accuracy(features, episodes))


def test_ensemble_averages_similarities_by_hand():
    # teacher 1 puts the query at 0.8 / 0.6, teacher 2 at 0 / 1: the mean, 0.4 / 0.8, says class 1
    first = torch.tensor([[1.0, 0], [0, 1], [0.8, 0.6]])
    second = torch.tensor([[1.0, 0], [0, 1], [0, 1]])
    episodes = EpisodeSet([one_episode([[0], [1]], [2], [1])], 2, 1)
    assert ensemble_accuracy(first[None], episodes).tolist() == [0.0]
    assert ensemble_accuracy(torch.stack([first, second]), episodes).tolist() == [100.0]
    assert ensemble_accuracy((teacher for teacher in (first, second)), episodes).tolist() == [100.0]


def test_bad_features_and_metric(random_case):
    features, episodes = random_case
    with pytest.raises(ConfigError, match="metric must be one of cosine, euclidean, got 'dot'"):
        prototype_accuracy(features, episodes, "dot")
    with pytest.raises(DataError, match="NaN"):
        prototype_accuracy(features * float("nan"), episodes)
    with pytest.raises(DataError, match="pool is empty"):
        ensemble_accuracy([], episodes)


def test_confidence_by_hand():
    mean, ci95 = confidence(torch.tensor([40.0, 50.0, 60.0]))
    assert mean == 50.0 and ci95 == pytest.approx(4.302653 * 10 / math.sqrt(3))  # t of 2 degrees of freedom
    many = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    assert confidence(many)[1] == pytest.approx(1.96 * many.std().item() / math.sqrt(len(many)), rel=1e-4)
    with pytest.raises(DataError, match="at least 2 episodes, got 1"):
        confidence(torch.tensor([1.0]))


ACCURACIES = {"frozen": torch.tensor([40.0, 60.0]), "meta-lora": torch.tensor([45.0, 65.0])}


def test_differences_are_paired():
    frozen, meta = summarise(ACCURACIES, "digits", ways=5, shots=1)
    assert (frozen["delta_vs_frozen"], frozen["delta_ci95"]) == (0.0, 0.0)
    assert meta == {
        "method": "meta-lora",
        "data": "digits",
        "ways": 5,
        "shots": 1,
        "episodes": 2,
        "accuracy": 55.0,
        "ci95": 127.062,  # t of one degree of freedom: 12.7062
        "delta_vs_frozen": 5.0,  # the same in both episodes: no spread
        "delta_ci95": 0.0,
    }


def test_summaries_need_pairs():
    with pytest.raises(DataError, match="no accuracies of 'frozen'"):
        summarise({"average": torch.zeros(2)}, "digits", 5, 1)
    with pytest.raises(DataError, match="average has 3 episodes, frozen 2"):
        summarise({**ACCURACIES, "average": torch.zeros(3)}, "digits", 5, 1)


def test_table_is_aligned_and_grouped():
    rows = summarise(ACCURACIES, "digits", 5, 1) + summarise(ACCURACIES, "digits", 5, 5)
    lines = format_table(rows).splitlines()
    assert lines[0].split() == ["method", "data", "task", "accuracy", "vs", "frozen"]
    assert lines[2] == "meta-lora  digits  5-way 1-shot  55.00 ± 127.06  +5.00 ± 0.00"
    assert lines[3] == "" and len(lines) == 6
    assert len({len(line) for line in lines if line}) == 1


@pytest.mark.parametrize("name", list(HEADS))
def test_heads_in_chunks_as_one_by_one(random_case, monkeypatch, name):
    features, episodes = random_case
    every = list(episodes)[:6]
    every[2] = dataclasses.replace(every[2], query=every[2].query[:20], query_labels=every[2].query_labels[:20])
    episodes = EpisodeSet(every, 5, 2)
    monkeypatch.setattr("lora_recycle.fewshot.accuracy._CHUNK_ELEMENTS", 1500)  # several chunks
    head, way = make_head(name, {}), torch.arange(5).repeat_interleave(2)
    expected = []
    for episode in every:
        logits = head.classify(features[episode.support.flatten()], way, 5, features[episode.query])
        expected.append(100.0 * (logits.argmax(-1) == episode.query_labels).float().mean().item())
    assert head_accuracy(features, episodes, head).tolist() == pytest.approx(expected)
    assert 30 < sum(expected) / 6 < 100


def test_prototype_heads_are_the_prototypes(random_case):
    features, episodes = random_case
    for metric in ("cosine", "euclidean"):
        expected = prototype_accuracy(features, episodes, metric)
        assert torch.equal(head_accuracy(features, episodes, make_head(f"{metric}_prototypes", {})), expected)


def test_heads_refuse_features_that_are_not_finite(random_case):
    features, episodes = random_case
    with pytest.raises(DataError, match="NaN"):
        head_accuracy(features * torch.nan, episodes, make_head("lda", {}))
