"""A visitor's task without a page: classes, answers, attention, and what is saved."""

import io
import zipfile

import pytest
import torch
from helpers_domains import mixed_model
from helpers_tiny import SIZES, random_pixels, shake, tiny_backbone, tiny_processor
from transformers import SiglipVisionConfig, SiglipVisionModel

from lora_recycle.app.answers import answers_html
from lora_recycle.app.session import Answer, FewShotSession, patch_attention
from lora_recycle.backbones.backbone import Backbone
from lora_recycle.errors import DataError
from lora_recycle.fewshot.domains import DomainChoice
from lora_recycle.modeling import domains
from lora_recycle.modeling.meta_lora import MetaLoRAForFewShotClassification


@pytest.fixture
def session(demo_model, pictures):
    session = FewShotSession(demo_model)
    session.add_class("red", pictures["red"][:2])
    session.add_class("  deep   blue ", pictures["blue"][:2])
    return session


def test_answers_are_those_of_the_model_and_come_with_what_was_seen(session, demo_model, pictures):
    files = [pictures["red"][2], pictures["blue"][2]]
    answers = session.classify(files)
    assert [next(iter(answer.probabilities)) for answer in answers] == ["red", "deep blue"]
    labels = ["red", "red", "deep blue", "deep blue"]
    expected = demo_model.fit(pictures["red"][:2] + pictures["blue"][:2], labels).predict_proba(files)
    for answer, row in zip(answers, expected.tolist(), strict=True):
        assert answer.probabilities == pytest.approx(dict(zip(demo_model.label_names, row, strict=True)), abs=1e-5)
        assert list(answer.probabilities.values()) == sorted(answer.probabilities.values(), reverse=True)
    assert answers[0].pixels.shape == (3, 64, 64) and answers[0].pixels.float().mean((1, 2))[0] > 150
    assert answers[0].attention.shape == (64,) and answers[0].attention.sum().item() == pytest.approx(1, abs=1e-5)


def test_a_class_added_on_the_fly_is_found(session, pictures):
    (before,) = session.classify(pictures["green"][2:3])
    session.add_class("green", pictures["green"][:2])
    (after,) = session.classify(pictures["green"][2:3])
    assert "green" not in before.probabilities and next(iter(after.probabilities)) == "green"


def test_sessions_of_one_model_do_not_mix(session, demo_model, pictures):
    other = FewShotSession(demo_model)
    for name in ("green", "red"):
        other.add_class(name, pictures[name][:1])
    (first,), (second,) = session.classify(pictures["red"][2:3]), other.classify(pictures["red"][2:3])
    assert set(first.probabilities) == {"red", "deep blue"} and set(second.probabilities) == {"green", "red"}
    assert session.classify(pictures["red"][2:3])[0].probabilities == first.probabilities


def test_what_is_saved_is_the_fitted_task(session, tmp_path, pictures):
    with zipfile.ZipFile(io.BytesIO(session.save())) as archive:
        archive.extractall(tmp_path)
    model = MetaLoRAForFewShotClassification.from_pretrained(tmp_path / "fitted_task")
    assert sorted(model.label_names) == ["deep blue", "red"]
    assert model.predict([pictures["red"][2], pictures["blue"][2]]) == ["red", "deep blue"]


def test_what_is_missing_is_told(session, demo_model, pictures):
    with pytest.raises(DataError, match="Give the class a name"):
        session.add_class(" ", pictures["red"])
    with pytest.raises(DataError, match="Two classes are called red"):
        session.add_class("red ", pictures["red"])
    with pytest.raises(DataError, match="fox has no images yet"):
        session.add_class("fox", [])
    with pytest.raises(DataError, match="new images to classify"):
        session.classify([])
    with pytest.raises(DataError, match="201 new images are more than the page takes"):
        session.classify([pictures["red"][0]] * 201)
    with pytest.raises(DataError, match="at least two classes"):
        FewShotSession(demo_model).classify(pictures["red"])


def siglip() -> Backbone:
    torch.manual_seed(0)
    return Backbone(shake(SiglipVisionModel(SiglipVisionConfig(**SIZES))), tiny_processor(), "tiny-siglip")


@pytest.mark.parametrize("backbone", [tiny_backbone(), siglip()], ids=["with CLS", "without CLS"])
def test_attention_is_that_of_the_last_layer(backbone):
    pixels = backbone.normalize(random_pixels(3))
    found = patch_attention(backbone, pixels)
    assert found.shape == (3, 16) and torch.allclose(found.sum(-1), torch.ones(3))
    layer = backbone.layers[-1]
    attention = layer.attention if hasattr(layer, "attention") else layer.self_attn
    norm = layer.layernorm_before if hasattr(layer, "layernorm_before") else layer.layer_norm1
    with torch.no_grad():
        hidden = backbone.tokens_entering(len(backbone.layers) - 1, pixels)
        query, key = (
            p(norm(hidden)).unflatten(-1, (2, 16)).transpose(1, 2) for p in (attention.q_proj, attention.k_proj)
        )
        rows = (query @ key.mT / 16**0.5).softmax(-1).mean(1)  # (B, T, T)
    rows = rows.mean(1) if backbone.family.pooler else rows[:, 0, 1:]
    torch.testing.assert_close(found, rows / rows.sum(-1, keepdim=True), atol=1e-5, rtol=1e-4)


def test_answers_are_written_out_and_escaped():
    attention = torch.tensor([0.6, 0.2, 0.1, 0.1])
    names = ["<b>cat</b>", *"abcdef"]
    page = answers_html([Answer(random_pixels(1)[0], dict.fromkeys(names, 1 / 7), attention)], 16)
    assert "<b>cat" not in page and "&lt;b&gt;cat" in page and "14.3%" in page
    assert "Half of the attention lies on 1 of 4 patches" in page and "2 less likely classes" in page


def test_the_page_says_which_domain_answers(tiny_backbone_path, toy_data, monkeypatch):
    model = mixed_model(tiny_backbone_path)
    monkeypatch.setattr(domains, "choose_domain", lambda *args: DomainChoice("birds"))
    session = FewShotSession(model)
    for name in ("n0", "n3"):
        session.add_class(name, list(toy_data.pixels[toy_data.by_class()[toy_data.label_names.index(name)][:2]]))
    (answer,) = session.classify([toy_data.pixels[5]])
    assert answer.domain == "birds" and "<p>By the examples: domain birds.</p>" in answers_html([answer], 8)
    expected = model.fit(*session._support(), domain="birds").predict_proba(toy_data.pixels[5:6])
    probabilities = [answer.probabilities[name] for name in model.label_names]
    assert probabilities == pytest.approx(expected[0].tolist(), abs=1e-5)
    monkeypatch.setattr(domains, "choose_domain", lambda *args: DomainChoice("shared"))
    assert "no domain of the adapters" in answers_html(session.classify([toy_data.pixels[5]]), 8)
