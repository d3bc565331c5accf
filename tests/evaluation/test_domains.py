"""A meta-LoRA with experts is judged by the network that each episode's support set chooses."""

import pytest
import torch
from helpers_domains import mixed_model

from lora_recycle.backbones.backbone import extract_features
from lora_recycle.evaluation.config import EvaluationConfig
from lora_recycle.evaluation.engine import EvaluationEngine
from lora_recycle.evaluation.evaluate import evaluate
from lora_recycle.fewshot.accuracy import head_accuracy, prototype_accuracy
from lora_recycle.fewshot.domains import DomainChoice
from lora_recycle.fewshot.episodes import EpisodeSet, sample_episodes
from lora_recycle.fewshot.heads import make_head
from lora_recycle.modeling import domains


@pytest.fixture(scope="module")
def model(tiny_backbone_path):
    return mixed_model(tiny_backbone_path)


@pytest.fixture
def alternating(monkeypatch):
    """Every second support set chooses the birds, the others the shared network."""
    turn = []

    def choice(*args):
        turn.append(None)
        return DomainChoice("shared" if len(turn) % 2 else "birds")

    monkeypatch.setattr(domains, "choose_domain", choice)


CONFIG = EvaluationConfig(ways=4, shots=(2,), queries=3, episodes=6, heads=("lda",))


def test_each_episode_is_judged_by_its_own_network(model, toy_data, alternating):
    result = evaluate(toy_data, model, CONFIG, backbone=model.domain_networks.frozen)
    drawn = sample_episodes(toy_data.labels, 4, 2, 3, 6, 0)
    features = {name: extract_features(model.network(name), toy_data.pixels) for name in model.domains}
    shared = prototype_accuracy(features["shared"], drawn)
    assert torch.equal(result.accuracies[2, "meta-lora-shared"], shared)
    for method, score in (
        ("meta-lora", prototype_accuracy),
        ("meta-lora + lda", lambda f, e: head_accuracy(f, e, make_head("lda", {}))),
    ):
        expected = torch.empty(6)
        for own, name in ((slice(0, None, 2), "shared"), (slice(1, None, 2), "birds")):
            expected[own] = score(features[name], EpisodeSet(drawn.episodes[own], 4, 2))
        assert torch.equal(result.accuracies[2, method], expected)
    assert [row["method"] for row in result.rows][-3:] == ["meta-lora-shared", "meta-lora", "meta-lora + lda"]
    assert "meta-lora, 2 shots: domains that the tasks chose: shared 50%, birds 50%." in result.domains


def test_the_engine_asks_the_real_rule_and_counts_every_look(model, toy_data):
    drawn = {2: sample_episodes(toy_data.labels, 4, 2, 3, 6, 0)}
    frozen = model.domain_networks.frozen
    engine = EvaluationEngine(toy_data, drawn, frozen, None, {"meta-lora": model})
    _, _, forwards, _ = engine._scored("meta-lora", 2, measure_memory=False)
    assert forwards == 6 * 8 + 12  # six networks see eight support images, one sees twelve queries
    names = ["frozen", *model.domains]
    looks = {
        name: extract_features(frozen if name == "frozen" else model.network(name), toy_data.pixels) for name in names
    }
    labels = torch.arange(4).repeat_interleave(2)
    rows = [one.support.flatten() for one in drawn[2]]
    chosen = [model.domain_networks.choose({n: f[own] for n, f in looks.items()}, labels).name for own in rows]
    assert engine.chosen["meta-lora", 2] == {name: chosen.count(name) for name in set(chosen)}
    assert engine.settings("meta-lora")["rule"] and "rule" not in engine.settings("meta-lora-shared")


def test_a_model_without_experts_has_one_row(model, toy_data, tiny_backbone_path):
    plain = mixed_model(tiny_backbone_path)
    plain.domain_networks = None
    result = evaluate(toy_data, plain, CONFIG, backbone=model.domain_networks.frozen)
    assert "meta-lora-shared" not in {row["method"] for row in result.rows}
