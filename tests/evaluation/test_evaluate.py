"""All methods on the same episodes of the toy images."""

import copy

import pytest
import torch
from helpers_tiny import copied_state, random_pixels, same_weights

from lora_recycle.backbones.backbone import extract_features
from lora_recycle.distillation.config import DistillationConfig
from lora_recycle.distillation.trainer import MetaLoRATrainer
from lora_recycle.errors import ConfigError, DataError
from lora_recycle.evaluation.config import EvaluationConfig
from lora_recycle.evaluation.evaluate import evaluate
from lora_recycle.fewshot.accuracy import ensemble_accuracy, head_accuracy, prototype_accuracy
from lora_recycle.fewshot.episodes import sample_episodes
from lora_recycle.fewshot.heads import make_head
from lora_recycle.images.labelled import LabelledImages
from lora_recycle.modeling.meta_lora import MetaLoRAForFewShotClassification


METHODS = ["frozen", "frozen-centred", "average", "ensemble", "random", "meta-lora"]
SMALL = {"ways": 4, "shots": (1, 2), "episodes": 40, "queries": 5}


@pytest.fixture(scope="module")
def data(toy_data):
    """Toy images under noise, so that accuracies are neither 0 nor 100."""
    pixels = (toy_data.pixels.float() * 0.2 + random_pixels(160).float() * 0.8).to(torch.uint8)
    return LabelledImages(pixels, toy_data.labels, toy_data.label_names, "noisy")


@pytest.fixture(scope="module")
def model(tiny_pool, tmp_path_factory):
    config = DistillationConfig(steps=0, rank=32, init="average")
    student = MetaLoRATrainer(tiny_pool, None, config).train(progress=False)
    folder = tmp_path_factory.mktemp("meta")
    student.to_model().save_pretrained(folder)
    return MetaLoRAForFewShotClassification.from_pretrained(folder)


@pytest.fixture(scope="module")
def result(data, model, tiny_pool):
    return evaluate(data, model, EvaluationConfig(**SMALL), pool=tiny_pool)


def test_a_row_for_each_method_and_shot(result):
    assert [(r["shots"], r["method"]) for r in result.rows] == [(k, m) for k in (1, 2) for m in METHODS]
    keys = {"method", "data", "ways", "shots", "episodes", "accuracy", "ci95", "delta_vs_frozen", "delta_ci95"}
    assert all(set(r) == keys and r["data"] == "noisy" and r["episodes"] == 40 for r in result.rows)
    assert all(30 < r["accuracy"] < 100 for r in result.rows) and result.notes == []
    assert result.rows[0]["delta_vs_frozen"] == 0
    assert {(r["shots"], r["method"]) for r in result.rows} == set(result.accuracies)


def test_same_seed_same_numbers(data, model, tiny_pool, result):
    before = copied_state(tiny_pool.backbone)
    assert evaluate(data, model, EvaluationConfig(**SMALL), pool=tiny_pool).rows == result.rows
    assert evaluate(data, model, EvaluationConfig(**SMALL, seed=1), pool=tiny_pool).rows != result.rows
    assert same_weights(tiny_pool.backbone, before)


@torch.no_grad()
def test_average_is_the_backbone_with_the_mean_change(data, tiny_pool, model, result):
    backbone = copy.deepcopy(tiny_pool.backbone)
    for name, parameter in backbone.model.named_parameters():
        changes = [a.factors.get(name.removesuffix(".weight")) for a in tiny_pool]
        parameter += sum((b @ a for b, a in filter(None, changes)), torch.zeros(())) / len(tiny_pool)
    drawn = sample_episodes(data.labels, 4, 2, 5, 40, 0)
    features, own = (extract_features(network, data.pixels) for network in (backbone, model.backbone))
    torch.testing.assert_close(own, features, rtol=1e-3, atol=1e-4)  # the meta-LoRA is here the average itself
    for method, seen in (("average", features), ("meta-lora", own)):
        assert torch.equal(result.accuracies[2, method], prototype_accuracy(seen, drawn))


def test_frozen_and_ensemble_by_hand(data, tiny_pool, result):
    drawn = sample_episodes(data.labels, 4, 1, 5, 40, 0)
    frozen = extract_features(tiny_pool.backbone, data.pixels)
    assert torch.equal(result.accuracies[1, "frozen"], prototype_accuracy(frozen, drawn))
    assert torch.equal(result.accuracies[1, "frozen-centred"], prototype_accuracy(frozen, drawn, centred=True))
    members = []
    for i in range(len(tiny_pool)):
        with tiny_pool.folded(i) as backbone:
            members.append(extract_features(backbone, data.pixels).half())
    assert torch.equal(result.accuracies[1, "ensemble"], ensemble_accuracy(members, drawn))


def test_without_a_pool_the_base_is_loaded_again(data, model, result):
    alone = evaluate(data, model, EvaluationConfig(**SMALL))
    assert [r["method"] for r in alone.rows] == ["frozen", "frozen-centred", "meta-lora"] * 2
    assert alone.rows[:3] == [r for r in result.rows[:6] if r["method"] in ("frozen", "frozen-centred", "meta-lora")]


def test_without_a_model_the_pool_alone(data, tiny_pool, result):
    alone = evaluate(data, config=EvaluationConfig(**SMALL), pool=tiny_pool)
    assert alone.rows == [r for r in result.rows if r["method"] != "meta-lora"]


def test_the_batch_size_changes_nothing(data, model, result):
    assert evaluate(data, model, EvaluationConfig(**SMALL, batch_size=7)).rows[0] == result.rows[0]


def test_heads_are_judged_on_both_backbones(data, model, result):
    judged = evaluate(data, model, EvaluationConfig(**SMALL, heads=("lda", "transductive_em")))
    methods = [row["method"] for row in judged.rows[:7]]
    assert methods[2:5] == ["frozen + lda", "frozen + transductive_em", "meta-lora"]
    assert methods[5:] == ["meta-lora + lda", "meta-lora + transductive_em"]
    assert torch.equal(judged.accuracies[2, "meta-lora"], result.accuracies[2, "meta-lora"])
    features = extract_features(model.backbone, data.pixels)
    drawn = sample_episodes(data.labels, 4, 2, 5, 40, 0)
    expected = head_accuracy(features, drawn, make_head("lda", {}))
    assert torch.equal(judged.accuracies[2, "meta-lora + lda"], expected)
    with pytest.raises(ConfigError, match="Unknown head 'svm'"):
        evaluate(data, model, EvaluationConfig(**SMALL, heads=("svm",)))


def test_too_many_ways(data, model):
    with pytest.raises(DataError, match="8"):
        evaluate(data, model, EvaluationConfig(ways=9, episodes=2))
