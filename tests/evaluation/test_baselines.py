"""Every tuning-free method through `evaluate`, against the same method on one task at a time."""

import pytest
import torch
from helpers_tiny import copied_state, random_pixels, same_weights

from lora_recycle.errors import ConfigError
from lora_recycle.evaluation.config import FROZEN_METHODS, EvaluationConfig, all_methods
from lora_recycle.evaluation.evaluate import evaluate
from lora_recycle.evaluation.selection import selected_accuracy
from lora_recycle.fewshot.accuracy import prototype_accuracy
from lora_recycle.fewshot.episodes import sample_episodes
from lora_recycle.images.labelled import LabelledImages
from lora_recycle.merging import tuning_free_methods


WAYS, SHOTS, QUERIES, EPISODES = 3, 2, 3, 9


@pytest.fixture(scope="module")
def data(toy_data):
    """Toy images under noise, so that accuracies are neither 0 nor 100."""
    pixels = (toy_data.pixels.float() * 0.3 + random_pixels(160).float() * 0.7).to(torch.uint8)
    keep = torch.arange(160) % 20 < 6
    return LabelledImages(pixels[keep], toy_data.labels[keep], toy_data.label_names, "noisy")


@pytest.fixture(scope="module")
def result(data, tiny_pool):
    before = copied_state(tiny_pool.backbone)
    found = evaluate(
        data,
        config=EvaluationConfig(methods=("all",), ways=WAYS, shots=(SHOTS,), queries=QUERIES, episodes=EPISODES),
        pool=tiny_pool,
    )
    assert same_weights(tiny_pool.backbone, before)
    return found


def test_a_row_for_each_method(result):
    assert [row["method"] for row in result.rows] == [*FROZEN_METHODS, *tuning_free_methods()]


@pytest.mark.parametrize("method", tuning_free_methods())
def test_many_tasks_at_once_are_one_task_at_a_time(data, tiny_pool, result, method):
    drawn = sample_episodes(data.labels, WAYS, SHOTS, QUERIES, EPISODES, 0)
    merging, labels = tuning_free_methods(0)[method], torch.arange(WAYS).repeat_interleave(SHOTS)
    for i, episode in enumerate(drawn.episodes[:2]):
        support, queries = data.pixels[episode.support.flatten()], data.pixels[episode.query]
        guesses = merging.classify(tiny_pool, support, labels, queries).argmax(1)
        accuracy = 100 * (guesses == episode.query_labels).float().mean()
        torch.testing.assert_close(result.accuracies[SHOTS, method][i], accuracy)


def test_the_methods_are_not_the_same_network(result):
    different = {tuple(result.accuracies[SHOTS, method].tolist()) for method in all_methods()}
    assert len(different) > len(all_methods()) / 2
    assert all(35 < row["accuracy"] < 100 for row in result.rows)  # chance is 33


def test_each_episode_is_judged_on_the_network_that_it_chooses():
    labels = torch.arange(4).repeat_interleave(5)
    drawn = sample_episodes(labels, 2, 1, 3, 8, 0)
    members = [torch.randn(20, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    accuracies = torch.stack([prototype_accuracy(member, drawn) for member in members])
    first = torch.stack([members[0][e.support.flatten()].sum() for e in drawn])

    def choice(look, labels):
        assert labels.tolist() == [0, 1] and torch.equal(look(0), look(0))
        return 0 if look(0).sum() > 0 else 1 + int(look(1).sum() > 0)

    found, looks, _ = selected_accuracy(members, drawn, choice)
    second = torch.stack([members[1][e.support.flatten()].sum() for e in drawn])
    chosen = torch.where(first > 0, 0, torch.where(second > 0, 2, 1))
    assert found.tolist() == [accuracies[chosen[e], e].item() for e in range(8)]
    assert chosen.unique().tolist() == [0, 1, 2]
    assert looks == 1 + (first <= 0).float().mean().item()  # the third is never looked at


def test_a_scale_in_the_name_multiplies_the_change(data, tiny_pool, result):
    config = EvaluationConfig(
        methods=("ties:0.3", "ties:3"), ways=WAYS, shots=(SHOTS,), queries=QUERIES, episodes=EPISODES
    )
    found = evaluate(data, config=config, pool=tiny_pool)
    assert [row["method"] for row in found.rows] == ["frozen", "ties:0.3", "ties:3"]
    accuracies = result.accuracies[SHOTS, "ties"]  # 0.3 is the default
    assert torch.equal(found.accuracies[SHOTS, "ties:0.3"], accuracies)
    assert not torch.equal(found.accuracies[SHOTS, "ties:3"], accuracies)
    with pytest.raises(ConfigError, match="arrow has no scale"):
        evaluate(data, config=EvaluationConfig(methods=("arrow:2",)), pool=tiny_pool)


def test_methods_that_cannot_be_had(data, tiny_pool):
    with pytest.raises(ConfigError, match="no method 'tie'; there are frozen, frozen-centred, .*arrow"):
        evaluate(data, config=EvaluationConfig(methods=("tie",)), pool=tiny_pool)
    with pytest.raises(ConfigError, match="ties needs a pool"):
        evaluate(data, config=EvaluationConfig(methods=("frozen-centred", "ties")), backbone=tiny_pool.backbone)
