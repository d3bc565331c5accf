"""Scores of strangers and calibration, by hand and on tasks that are easy."""

import pytest
import torch
from sklearn.metrics import roc_auc_score

from lora_recycle.distillation.config import DistillationConfig
from lora_recycle.distillation.trainer import MetaLoRATrainer
from lora_recycle.errors import ConfigError
from lora_recycle.evaluation.rejection import (
    OpenTask,
    expected_calibration_error,
    fit_temperature,
    known_scores,
    open_tasks,
)
from lora_recycle.fewshot.episodes import sample_episodes


def test_scores_by_hand():
    logits = torch.tensor([[0.2, 0.1], [0.5, 0.5]])
    assert known_scores(logits, "max_cosine", 0.1).tolist() == pytest.approx([0.2, 0.5])
    e = 2.718281828
    assert known_scores(logits, "max_softmax", 0.1).tolist() == pytest.approx([e / (e + 1), 0.5])
    energy = [0.1 * torch.tensor([2.0, 1.0]).exp().sum().log().item(), 0.5 + 0.1 * 0.6931472]
    assert known_scores(logits, "energy", 0.1).tolist() == pytest.approx(energy)
    with pytest.raises(ConfigError, match="score must be one of"):
        known_scores(logits, "margin", 0.1)


def test_calibration_by_hand():
    confidence = torch.tensor([0.95, 0.95, 0.55, 0.55])
    correct = torch.tensor([True, True, True, False])
    assert expected_calibration_error(confidence, correct) == pytest.approx(100 * (0.1 + 0.1) / 4, abs=1e-3)
    assert expected_calibration_error(torch.ones(3), torch.ones(3, dtype=torch.bool)) == 0


def test_the_temperature_makes_frequencies_of_probabilities():
    """Right in 3 of 4, with a lead of 0.2: sigmoid(0.2 / T) = 3 / 4."""
    task = OpenTask(torch.tensor([[0.2, 0.0]] * 4), torch.tensor([0, 0, 0, 1]))
    assert fit_temperature([task]) == pytest.approx(0.2 / torch.tensor(3.0).log().item(), rel=0.05)


def test_strangers_of_other_colours_are_told(toy_data):
    features = toy_data.pixels.float().mean((2, 3))
    features = features - features.mean(0)
    episodes = sample_episodes(toy_data.labels, 4, 2, 5, 8, seed=0)
    tasks = open_tasks(features, episodes)
    assert len(tasks) == 8 and tasks[0].logits.shape == (20, 2) and len(tasks[0].labels) == 10
    right = [(task.logits[:10].argmax(1) == task.labels).float().mean() for task in tasks]
    assert torch.stack(right).mean() > 0.95
    is_known = torch.arange(20) < 10
    areas = [roc_auc_score(is_known, known_scores(task.logits, "max_cosine", 0.1)) for task in tasks]
    assert sum(areas) / len(areas) > 0.75
    with pytest.raises(ConfigError, match="even number of ways"):
        open_tasks(features, sample_episodes(toy_data.labels, 5, 1, 1, 2, seed=0))


@pytest.mark.parametrize("head", ["prototypes", "lda", "logistic_regression"])
def test_predict_says_none_for_what_is_like_no_class(head, tiny_pool, toy_data):
    student = MetaLoRATrainer(tiny_pool, None, DistillationConfig(steps=0, rank=4)).train(progress=False)
    model = student.to_model({"head": head})
    model.fit(toy_data.pixels[::20][:4], ["a", "b", "c", "d"])
    near, features = model.similarity(toy_data.pixels[::7]), model.embed(toy_data.pixels[::7])
    cosine = torch.cosine_similarity(features[:, None], model.embed(toy_data.pixels[::20][:4])[None], dim=-1)
    torch.testing.assert_close(near, cosine.max(1).values, rtol=1e-4, atol=1e-5)
    limit = near.median().item()
    said, labels = model.predict(toy_data.pixels[::7], reject_below=limit), model.predict(toy_data.pixels[::7])
    assert None in said and None not in labels
    assert said == [label if value >= limit else None for label, value in zip(labels, near.tolist(), strict=True)]
