"""The meta-LoRA folded into the weights: the bare backbone's forward, the same answers, the same adapter on disk."""

import pytest
import torch
from helpers_tiny import copied_state, random_pixels, tiny_backbone
from peft import LilyConfig, LoHaConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file

from lora_recycle.errors import AdapterError
from lora_recycle.modeling.meta_lora import MetaLoRAForFewShotClassification


TARGETS = ["q_proj", "v_proj", "fc1"]
CONFIGS = {
    "lora": LoraConfig(r=4, target_modules=TARGETS),
    "dora": LoraConfig(r=4, target_modules=TARGETS, use_dora=True),
    "loha": LoHaConfig(r=4, target_modules=TARGETS),
}


def wearing(config) -> MetaLoRAForFewShotClassification:
    """A tiny model whose adapter changes much."""
    backbone = tiny_backbone()
    torch.manual_seed(0)  # of the adapter's own beginning
    peft_model, generator = get_peft_model(backbone.model, config), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return MetaLoRAForFewShotClassification(backbone, peft_model)


@pytest.mark.parametrize("kind", CONFIGS)
@torch.no_grad()
def test_a_merged_model_is_the_bare_network_with_the_same_answers(kind):
    model, bare, x = wearing(CONFIGS[kind]), tiny_backbone(), torch.randn(3, 3, 32, 32)
    before = model.features(x)
    assert (before - bare.features(x)).abs().max() > 1e-2
    assert model.merge() is model
    torch.testing.assert_close(model.features(x), before, rtol=1e-4, atol=1e-5)
    modules = {name: type(module) for name, module in model.backbone.model.named_modules()}
    assert modules == {name: type(module) for name, module in bare.model.named_modules()}
    again = model.features(x)
    assert torch.equal(model.merge().features(x), again)


def test_a_merged_model_fits_predicts_and_learns_more(toy_data):
    model, plain = wearing(CONFIGS["lora"]).merge(), wearing(CONFIGS["lora"])
    support, labels = toy_data.pixels[::10], [int(label) for label in toy_data.labels[::10]]
    for one in (model, plain):
        one.fit(support[:8], labels[:8]).add_classes(support[8:], labels[8:])
    probabilities = model.predict_proba(toy_data.pixels[5::20])
    torch.testing.assert_close(probabilities, plain.predict_proba(toy_data.pixels[5::20]), rtol=1e-3, atol=1e-4)
    assert model.predict(toy_data.pixels[5::20]) == [model.label_names[i] for i in probabilities.argmax(1)]


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_merged_model_saves_the_adapter_that_it_wore(kind, tmp_path):
    model = wearing(CONFIGS[kind])
    model.save_pretrained(tmp_path / "before")
    merged = copied_state(model.merge().backbone)
    model.save_pretrained(tmp_path / "after")
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("before", "after"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    now = model.backbone.state_dict()
    assert now.keys() == merged.keys() and all(torch.equal(now[key], merged[key]) for key in now)


def test_what_was_saved_merged_loads_as_it_was(tiny_pool_path, tmp_path, toy_data):
    model = MetaLoRAForFewShotClassification.from_pretrained(tiny_pool_path / "adapter-0")
    model.fit(toy_data.pixels[::20], list(range(8)))
    expected = model.predict_proba(toy_data.pixels)
    model.merge().save_pretrained(tmp_path)
    loaded = MetaLoRAForFewShotClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.predict_proba(toy_data.pixels), expected)


def test_half_precision_merges_too():
    model, x = wearing(CONFIGS["lora"]).to(torch.bfloat16), torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        before = model.features(x).float()
        after = model.merge().features(x).float()
    assert (after - before).norm() < 0.05 * before.norm()


def test_what_is_no_change_of_weights_is_refused_and_stays():
    model = wearing(LilyConfig(r=4, target_modules=TARGETS))
    before, x = copied_state(model), random_pixels(2)
    with torch.no_grad():
        answer = model.embed(x)
    with pytest.raises(AdapterError, match=r"cannot be folded into the weights .* without merge\(\)"):
        model.merge()
    assert torch.equal(model.embed(x), answer)
    now = model.state_dict()
    assert now.keys() == before.keys() and all(torch.equal(now[key], before[key]) for key in now)


def test_a_merge_that_would_change_the_answers_is_undone(monkeypatch):
    model, x = wearing(CONFIGS["lora"]), random_pixels(2)
    answer = model.embed(x)
    layer = model.backbone.model.get_submodule("layers.1.mlp.fc1")
    monkeypatch.setattr(layer, "merge", lambda: None)  # its share of the adapter would be lost
    with pytest.raises(AdapterError, match="cannot be folded"):
        model.merge()
    assert torch.equal(model.embed(x), answer)
