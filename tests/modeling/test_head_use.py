"""Heads in the model: chosen by name, saved with their parameters, fitted on surrogate episodes."""

import json
import warnings

import pytest
import torch
from helpers_tiny import repair_checksums
from safetensors import safe_open
from safetensors.torch import save_file

from lora_recycle import fit_head
from lora_recycle.errors import AdapterError, ConfigError, DataError
from lora_recycle.fewshot.heads import HEADS, make_head
from lora_recycle.modeling.meta_lora import MetaLoRAForFewShotClassification
from lora_recycle.modeling.pipeline import FewShotImageClassificationPipeline
from lora_recycle.modeling.task import load_task


@pytest.fixture(scope="module")
def worn(folder):
    return MetaLoRAForFewShotClassification.from_pretrained(folder)


@pytest.fixture
def model(worn):
    """The same network without a task and with the default head."""
    fresh = MetaLoRAForFewShotClassification(worn.backbone, worn.peft_model, {})
    return fresh


def with_head(model, name):
    return MetaLoRAForFewShotClassification(model.backbone, model.peft_model, {"head": name})


def images(data, classes, each, start=0):
    rows = [int(i) for c in classes for i in data.by_class()[c][start : start + each]]
    return data.pixels[rows], [f"n{int(data.labels[i])}" for i in rows]


@pytest.mark.parametrize("name", list(HEADS))
def test_fit_in_sessions_predict_and_come_back(name, model, toy_data, tmp_path):
    model = with_head(model, name)
    queries, truth = images(toy_data, [0, 4, 6], 4, start=8)
    model.fit(*images(toy_data, [0, 4, 6], 4))
    expected = model.predict_proba(queries)
    assert model.predict(queries) == truth  # colours are easy
    model.fit(*images(toy_data, [0, 4], 4)).add_classes(*images(toy_data, [6], 4))
    torch.testing.assert_close(model.predict_proba(queries), expected, rtol=1e-2, atol=1e-3)
    model.save_pretrained(tmp_path)
    loaded = MetaLoRAForFewShotClassification.from_pretrained(tmp_path)
    assert loaded.head.name == name and loaded.label_names == ["n0", "n4", "n6"]
    torch.testing.assert_close(loaded.predict_proba(queries), model.predict_proba(queries), rtol=1e-4, atol=1e-5)
    assert loaded.prototypes.shape == (3, 32)


@pytest.mark.parametrize("name", list(HEADS))
@torch.no_grad()
def test_forward_is_fit_and_predict(name, model, toy_data):
    model = with_head(model, name)
    support, labels = images(toy_data, [0, 1], 3)
    query, _ = images(toy_data, [0, 1], 3, start=5)
    numbers = torch.tensor([int(label[1:]) for label in labels])
    output = model(model.preprocess(support), numbers, model.preprocess(query), torch.tensor([0, 0, 0, 1, 1, 1]))
    expected = model.fit(support, labels).predict_proba(query)
    torch.testing.assert_close(output.logits.softmax(-1), expected, rtol=1e-3, atol=1e-4)
    assert output.loss.isfinite()


def test_a_task_serves_the_heads_that_need_no_more(model, toy_data, tmp_path):
    support, queries = images(toy_data, [0, 4], 3), images(toy_data, [0, 4], 3, start=6)[0]
    model.fit(*support).save_pretrained(tmp_path)
    with safe_open(tmp_path / "few_shot_task.safetensors", "pt") as file:
        assert set(file.keys()) == {"sums", "counts"}  # what earlier versions wrote and read
    other = MetaLoRAForFewShotClassification.from_pretrained(tmp_path, head="transductive_transport")
    expected = with_head(model, "transductive_transport").fit(*support).predict_proba(queries)
    torch.testing.assert_close(other.predict_proba(queries), expected, rtol=1e-4, atol=1e-5)
    with pytest.warns(UserWarning, match="holds counts, sums, but the head lda needs counts, scatter, sums"):
        other = MetaLoRAForFewShotClassification.from_pretrained(tmp_path, head="lda")
    with pytest.raises(DataError, match="has no task yet"):
        other.predict(queries)


def test_unknown_heads_are_told_before_anything_is_read(tmp_path):
    with pytest.raises(ConfigError, match="Unknown head 'svm'. There are prototypes, .*lda"):
        MetaLoRAForFewShotClassification.from_pretrained(tmp_path / "nowhere", head="svm")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scatter": torch.zeros(31, 31)}, "scatter has the shape"),
        ({"scatter": torch.zeros(32)}, "scatter has the shape"),
        ({"sums": torch.zeros(3, 32)}, "2 labels on 32 features, but sums has the shape"),
        ({"counts": torch.tensor([1.0, torch.nan])}, "not finite"),
        ({"scatter": torch.diag(torch.tensor([-10.0] + [1.0] * 31))}, "cannot be read"),  # no covariance
        ({"sums": torch.full((2, 32), 3e38)}, "weights is not finite"),
        ({"scatter": torch.eye(32).double()}, "scatter holds numbers of the type torch.float64"),
        ({"features": torch.zeros(6, 31)}, "features has the shape"),
        ({"features": torch.zeros(7, 32)}, "labels has the shape"),
        ({"features": torch.full((6, 32), torch.nan)}, "not finite"),
        ({"features": torch.ones(6, 32)}, "longer than 1"),
        ({"labels": torch.tensor([0.0, 0, 0, 1, 1, 1])}, "labels holds numbers of the type torch.float32"),
        ({"labels": torch.tensor([0, 0, 0, 0, 0, 2])}, "do not number the 2 classes"),
    ],
)
def test_a_damaged_task_is_refused(model, toy_data, tmp_path, change, message):
    model = with_head(model, "logistic_regression" if change.keys() & {"features", "labels"} else "lda")
    model.fit(*images(toy_data, [0, 4], 3)).save_pretrained(tmp_path)
    path = tmp_path / "few_shot_task.safetensors"
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in list(file.keys())}
    save_file(tensors | change, path, metadata)
    repair_checksums(tmp_path)
    with pytest.raises(AdapterError, match=message):
        MetaLoRAForFewShotClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"head": "svm"}, "Unknown head 'svm'.*Pass head="),
        ({"head": ["lda"]}, "meta_lora_config.json"),
        ({"head_parameters": []}, "must hold an object for each head"),
        ({"head_parameters": {"lda": 3}}, "must hold an object for each head"),
        (
            {"head_parameters": {"transductive_em": {"scale": -1}}},
            "scale of the head transductive_em must be pos",
        ),
        ({"head_parameters": {"transductive_em": {"balance": [1.0] * 101}}}, "balance .* must be positive"),
        ({"head_parameters": {"transductive_em": {"balance": [True]}}}, "balance .* must be positive"),
        ({"head_parameters": {"prototypes": {"temperature": 10**400}}}, "temperature .* must be positive"),
        ({"temperature": 10**400}, "temperature must be a positive number"),
        (
            {"head": "transductive_transport", "head_parameters": {"transductive_transport": {"passes": 1e6}}},
            "passes must be at most 100",
        ),
        ({"head": "lda", "head_parameters": {"lda": {"depth": 1}}}, "cannot be made with"),
        ({"head": "transductive_em", "head_parameters": {"transductive_em": {"scale": [1]}}}, "cannot be made with"),
    ],
)
def test_a_damaged_sidecar_is_refused(folder, tmp_path, settings, message):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    sidecar = tmp_path / "meta_lora_config.json"
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | settings))
    with pytest.raises(AdapterError, match=message):
        MetaLoRAForFewShotClassification.from_pretrained(tmp_path)


def test_a_task_that_would_take_all_memory_to_fit_is_refused(tmp_path):
    """A small file asks for images x classes scores."""
    classes, head = 2**13 + 1, make_head("logistic_regression", {})
    tensors = {"features": torch.zeros(classes, 1), "labels": torch.arange(classes)}
    names = json.dumps({"label_names": list(range(classes))})
    save_file(tensors, tmp_path / "task.safetensors", {"header": names})
    with pytest.raises(AdapterError, match="8193 images and 8193 labels, too many"):
        load_task(tmp_path / "task.safetensors", head, 1)


def test_a_head_that_this_version_lacks_can_be_replaced(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    sidecar = tmp_path / "meta_lora_config.json"
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | {"head": "of the future"}))
    assert MetaLoRAForFewShotClassification.from_pretrained(tmp_path, head="lda").head.name == "lda"


@pytest.mark.parametrize("name", ["prototypes", "transductive_em"])
def test_parameters_are_learned_on_surrogates_and_saved(name, model, tiny_surrogate, tmp_path):
    model = with_head(model, name)
    before = model.head
    head = fit_head(model, tiny_surrogate, ways=3, steps=3)
    assert head is model.head and head.parameters() != before.parameters() == make_head(name, {}).parameters()
    again = fit_head(with_head(model, name), tiny_surrogate, ways=3, steps=3)
    assert again.parameters() == head.parameters()
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = MetaLoRAForFewShotClassification.from_pretrained(tmp_path)
    assert loaded.head.parameters() == head.parameters()
    # another head of the same folder has its own
    other = MetaLoRAForFewShotClassification.from_pretrained(tmp_path, head="cosine_prototypes")
    assert other.head.temperature == 0.1 and other.settings["head_parameters"] == model.settings["head_parameters"]


def test_a_learned_temperature_fits_the_surrogates_better(model, tiny_surrogate):
    """Too sure or too unsure at the start, the head comes nearer the same temperature."""
    found = []
    for start in (0.01, 1.0):
        model.head = make_head("cosine_prototypes", {"head_parameters": {"cosine_prototypes": {"temperature": start}}})
        found.append(fit_head(model, tiny_surrogate, ways=3, steps=20).temperature)
    assert 0.01 < found[0] < found[1] < 1.0


def test_what_cannot_be_fitted(model, tiny_surrogate):
    with pytest.raises(ConfigError, match="The head lda has no parameters to learn"):
        fit_head(with_head(model, "lda"), tiny_surrogate)
    with pytest.raises(DataError, match=r"no adapter has 9 classes of 1 \+ 1 surrogate images that it recognises"):
        fit_head(model, tiny_surrogate, ways=9)


def test_pipelines_refuse_transductive_heads(model):
    with pytest.raises(ConfigError, match="transductive_em classifies a set of images together"):
        FewShotImageClassificationPipeline(with_head(model, "transductive_em"))
