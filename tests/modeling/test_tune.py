"""`model.tune`: the tuned model predicts, is saved and comes back; `fit` takes it to where it was."""

import re
from pathlib import Path

import pytest
import torch
from helpers_tiny import random_pixels

from lora_recycle import MetaLoRAForFewShotClassification, TaskTuningConfig
from lora_recycle.errors import ConfigError, DataError
from lora_recycle.evaluation.tuned import MetaLoRATuning
from lora_recycle.finetuning import tuning_methods
from lora_recycle.modeling.tuning import default_config


NAMES = ["ant", "ant", "bee", "bee", "cow", "cow"]
CONFIG = TaskTuningConfig(steps=6, lr=5e-3, head_lr=0.05, last_layers=1)


@pytest.fixture
def model(folder):
    return MetaLoRAForFewShotClassification.from_pretrained(folder)


@pytest.fixture(scope="module")
def images():
    return random_pixels(6)


def test_tuning_changes_the_last_layers_and_makes_the_support_set_surer(model, images):
    before = {name: p.clone() for name, p in model.named_parameters()}
    fitted = model.fit(images, NAMES).predict_proba(images)
    tuned = model.tune(images, NAMES, CONFIG).predict_proba(images)
    rows, columns = range(6), [0, 0, 1, 1, 2, 2]
    assert model.label_names == ["ant", "bee", "cow"]
    assert tuned[rows, columns].mean() > fitted[rows, columns].mean()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all(".layers.1." in name and "lora_" in name for name in changed)


def test_a_tuned_model_comes_back_as_it_was_saved(model, images, tmp_path):
    expected = model.tune(images, NAMES, CONFIG).predict_proba(images)
    model.save_pretrained(tmp_path)
    loaded = MetaLoRAForFewShotClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.predict_proba(images), expected, atol=1e-5, rtol=1e-4)
    loaded.add_classes(images[:2].flip(0), ["dog", "dog"])  # tuned prototypes are still of the embeddings' size
    assert loaded.label_names == ["ant", "bee", "cow", "dog"]
    sizes = loaded.prototypes.norm(dim=1)
    assert sizes.max() < 2 * sizes.min()


def test_every_tuning_begins_with_the_meta_lora_and_fit_returns_to_it(model, folder, images):
    fresh = MetaLoRAForFewShotClassification.from_pretrained(folder).fit(images, NAMES).predict_proba(images)
    once = model.tune(images, NAMES, CONFIG).predict_proba(images)
    model.tune(images.flip(0), NAMES, CONFIG)
    assert torch.equal(model.tune(images, NAMES, CONFIG).predict_proba(images), once)
    assert torch.equal(model.fit(images, NAMES).predict_proba(images), fresh)


def test_the_method_of_the_benchmark_is_what_users_get(model, images):
    labels, queries = torch.tensor([0, 0, 1, 1, 2, 2]), random_pixels(4, seed=1)
    scores = MetaLoRATuning(model, CONFIG).classify(None, images, labels, queries)
    expected = model.tune(images, NAMES, CONFIG).predict_proba(queries)
    found = (scores * CONFIG.temperature / model.head.temperature).softmax(1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_a_tuned_model_that_is_merged_stays_tuned(model, images, tmp_path):
    expected = model.tune(images, NAMES, CONFIG).merge().predict_proba(images)
    refitted = model.fit(images, NAMES).predict_proba(images)
    model.save_pretrained(tmp_path)
    loaded = MetaLoRAForFewShotClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.predict_proba(images), refitted, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(refitted, expected, atol=1e-4)  # prototypes of the tuned network, not tuned ones


def test_no_steps_is_fit(model, images):
    fitted = model.fit(images, NAMES).predict_proba(images)
    config = TaskTuningConfig(**{**default_config(model.head).to_dict(), "steps": 0})
    torch.testing.assert_close(model.tune(images, NAMES, config).predict_proba(images), fitted, atol=1e-5, rtol=1e-4)


def test_by_default_one_image_of_each_class_is_fit_and_several_are_tuned(model, images):
    fitted = model.fit(images[::2], NAMES[::2]).predict_proba(images)
    assert torch.equal(model.tune(images[::2], NAMES[::2]).predict_proba(images), fitted)
    fitted = model.fit(images, NAMES).predict_proba(images)
    model.tune(images, NAMES)
    assert (model.predict_proba(images) - fitted).abs().max() > 1e-3
    means = model.embed(images).view(3, 2, -1).mean(1)  # the prototypes are those of the tuned network's embeddings
    torch.testing.assert_close(model.prototypes, means, atol=1e-5, rtol=1e-4)


def test_what_cannot_be_tuned(model, folder, images):
    with pytest.raises(DataError, match="at least two classes"):
        model.tune(images, ["ant"] * 6)
    with pytest.raises(DataError, match="6 images, but 5 labels"):
        model.tune(images, NAMES[:5])
    with pytest.raises(ConfigError, match="euclidean.*prototypes"):
        model.tune(images, NAMES, TaskTuningConfig(metric="euclidean"))
    with pytest.raises(ConfigError, match="head lda"):
        MetaLoRAForFewShotClassification.from_pretrained(folder, head="lda").tune(images, NAMES)
    with pytest.raises(ConfigError, match="merged"):
        model.merge().tune(images, NAMES)


def test_the_python_of_the_page(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "tuning.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S):
        exec(compile(code, f"docs/tuning.md: {code.splitlines()[0]}", "exec"), names)
    assert names["scores"].shape == (4, 2) and (tmp_path / "tuned" / "adapter_model.safetensors").is_file()
    told = set(re.findall(r"^\| `([\w-]+)` \|", page, re.M))
    assert told == {*tuning_methods(), "meta-lora-tuned"}
