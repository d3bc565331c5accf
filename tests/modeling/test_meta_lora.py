"""The model that users wear: saved, loaded, fitted, asked."""

import json
import warnings

import numpy as np
import pytest
import torch
from helpers_tiny import random_pixels, repair_checksums
from peft import PeftConfig, PeftModel
from PIL import Image
from transformers import AutoModel

from lora_recycle.distillation.config import DistillationConfig
from lora_recycle.distillation.trainer import MetaLoRATrainer
from lora_recycle.errors import AdapterError, DataError
from lora_recycle.fewshot.prototypes import prototype_logits
from lora_recycle.modeling.meta_lora import MetaLoRAForFewShotClassification


@pytest.fixture(scope="module")
def student(tiny_pool):
    return MetaLoRATrainer(tiny_pool, None, DistillationConfig(steps=0, rank=8)).train(progress=False)


@pytest.fixture
def model(student):
    return student.to_model()


@pytest.fixture
def saved(model, tmp_path):
    model.save_pretrained(tmp_path / "meta")
    return tmp_path / "meta"


def pictures(data, classes, each=2, start=0):
    """The first images of some classes as PIL, and their label names."""
    rows = [int(i) for c in classes for i in data.by_class()[c][start : start + each]]
    images = [Image.fromarray(data.pixels[i].permute(1, 2, 0).numpy()) for i in rows]
    return images, [data.label_names[int(data.labels[i])] for i in rows]


def test_loading_and_saving_warn_of_nothing_and_ask_the_hub_nothing(hub, tmp_path):
    """The embedded base goes by a name that looks like a repo."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = MetaLoRAForFewShotClassification.from_pretrained("demo")
        model.save_pretrained(tmp_path / "meta")
    assert not hub.requests
    assert PeftConfig.from_pretrained(tmp_path / "meta").base_model_name_or_path == "lora-recycle/tiny-vit-64"


@torch.no_grad()
def test_a_loaded_model_has_the_same_features(model, saved):
    x = torch.randn(3, 3, 32, 32)
    loaded = MetaLoRAForFewShotClassification.from_pretrained(saved)
    assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), model.parameters(), strict=True))
    torch.testing.assert_close(loaded.features(x), model.features(x))  # memory alignment moves the last digit


@torch.no_grad()
def test_the_folder_is_a_plain_peft_adapter(model, saved, tiny_backbone_path):
    x = torch.randn(3, 3, 32, 32)
    base = AutoModel.from_pretrained(tiny_backbone_path, add_pooling_layer=False)
    bare = base(x).last_hidden_state[:, 0]
    features = PeftModel.from_pretrained(base, saved).eval()(pixel_values=x).last_hidden_state[:, 0]
    torch.testing.assert_close(features, model.features(x), rtol=1e-4, atol=1e-5)
    assert (features - bare).abs().max() > 1e-2
    names = {path.name for path in saved.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "meta_lora_config.json"} <= names
    assert "config.json" not in names and "few_shot_task.safetensors" not in names
    config = json.loads((saved / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_backbone_path)


@torch.no_grad()
def test_forward_by_hand(model):
    support, query = torch.randn(4, 3, 32, 32), torch.randn(3, 3, 32, 32)
    labels = torch.tensor([1, 0, 1, 0])
    output = model(support, labels, query, torch.tensor([0, 1, 1]))
    f = model.features(support)
    prototypes = torch.stack([(f[1] + f[3]) / 2, (f[0] + f[2]) / 2])
    torch.testing.assert_close(output.prototypes, prototypes, rtol=1e-4, atol=1e-5)
    cosine = torch.cosine_similarity(model.features(query)[:, None], prototypes[None], dim=-1)
    torch.testing.assert_close(output.logits, cosine / 0.1, rtol=1e-4, atol=1e-4)
    p = output.logits.softmax(-1)
    torch.testing.assert_close(output.loss, -(p[0, 0] * p[1, 1] * p[2, 1]).log() / 3)
    assert model(support, labels, query).loss is None


@torch.no_grad()
def test_metric_and_temperature_are_saved(student, tmp_path):
    settings = {"metric": "euclidean", "temperature": 2.0, "sources": ["a"]}
    student.to_model(settings).save_pretrained(tmp_path)
    loaded = MetaLoRAForFewShotClassification.from_pretrained(tmp_path)
    assert loaded.settings["sources"] == ["a"]
    support, query = torch.randn(2, 3, 32, 32), torch.randn(3, 3, 32, 32)
    expected = -torch.cdist(loaded.features(query), loaded.features(support)) / 2
    torch.testing.assert_close(loaded(support, torch.tensor([0, 1]), query).logits, expected, rtol=1e-4, atol=1e-4)


def test_gradients_reach_the_lora_only(model):
    model(
        torch.randn(2, 3, 32, 32), torch.tensor([0, 1]), torch.randn(2, 3, 32, 32), torch.tensor([1, 0])
    ).loss.backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    assert reached and all("lora_" in name for name in reached)
    model.zero_grad()


def test_fit_and_predict_agree_on_new_images(model, toy_data):
    images, labels = pictures(toy_data, [5, 2, 7])
    assert model.fit(images, labels) is model
    assert model.label_names == ["n2", "n5", "n7"]
    queries, truth = pictures(toy_data, [2, 5, 7], each=4, start=5)
    probabilities, predicted = model.predict_proba(queries), model.predict(queries)
    assert probabilities.shape == (12, 3) and probabilities.dtype == torch.float32
    torch.testing.assert_close(probabilities.sum(1), torch.ones(12))
    assert predicted == [model.label_names[i] for i in probabilities.argmax(1)]
    assert predicted == truth  # colours are easy


@torch.no_grad()
def test_fit_is_forward(model, toy_data):
    images, labels = pictures(toy_data, [0, 1])
    queries, _ = pictures(toy_data, [0, 1], start=5)
    numbers = torch.tensor([int(label[1:]) for label in labels])
    output = model(model.preprocess(images), numbers, model.preprocess(queries))
    probabilities = model.fit(images, labels).predict_proba(queries)
    torch.testing.assert_close(probabilities, output.logits.softmax(-1), rtol=1e-4, atol=1e-5)


def test_classes_added_later_are_as_if_fitted_at_once(model, toy_data):
    first, names = pictures(toy_data, [0, 1])
    more, more_names = pictures(toy_data, [1, 6], start=2, each=3)
    model.fit(first, names).add_classes(more, more_names)
    label_names, prototypes = list(model.label_names), model.prototypes
    model.fit(first + more, names + more_names)
    assert label_names == model.label_names == ["n0", "n1", "n6"]
    torch.testing.assert_close(prototypes, model.prototypes, rtol=1e-4, atol=1e-5)


def test_a_prediction_sees_one_task_though_another_is_fitted_meanwhile(model, toy_data, monkeypatch):
    images, labels = pictures(toy_data, [0, 1])
    model.fit(images, labels)
    embed = model.embed

    def refit_first(queries, **options):
        monkeypatch.setattr(model, "embed", embed)
        model.fit(*pictures(toy_data, [7, 5, 6]))
        return embed(queries, **options)

    monkeypatch.setattr(model, "embed", refit_first)
    assert model.predict(images) == labels
    assert model.label_names == ["n5", "n6", "n7"]


def test_fit_is_one_forward(model, toy_data, monkeypatch):
    batches, features = [], model.features
    monkeypatch.setattr(
        model, "features", lambda pixel_values, *_: batches.append(len(pixel_values)) or features(pixel_values)
    )
    model.fit(*pictures(toy_data, [0, 1, 2]))
    assert batches == [6]


def test_prototypes_are_prepared_once_and_follow_the_task(model, toy_data, monkeypatch):
    prepared, prepare = [], model.head.prepare
    monkeypatch.setattr(model.head, "prepare", lambda found: prepared.append(len(found["counts"])) or prepare(found))
    queries, _ = pictures(toy_data, [0, 1, 4])
    model.fit(*pictures(toy_data, [0, 1]))
    model.predict(queries)
    assert model.predict_proba(queries).shape == (6, 2) and prepared == [2]
    model.add_classes(*pictures(toy_data, [4]))
    assert model.predict_proba(queries).shape == (6, 3) and prepared == [2, 3]
    expected = prototype_logits(model.embed(queries), model.prototypes, temperature=0.1).softmax(-1)
    torch.testing.assert_close(model.predict_proba(queries), expected)


def test_a_second_fit_forgets_the_first(model, toy_data):
    model.fit(*pictures(toy_data, [0, 1]))
    model.fit(*pictures(toy_data, [3, 4]))
    assert model.label_names == ["n3", "n4"] and model.prototypes.shape == (2, 32)


@pytest.mark.parametrize(
    "labels",
    [["b", "b", "a", "a"], [10, 10, 3, 3], np.array([10, 10, 3, 3]), list(np.array([10, 10, 3, 3])),
     torch.tensor([10, 10, 3, 3]), list(torch.tensor([10, 10, 3, 3])), ["cat", "cat", 7, 7]],
)  # fmt: skip
def test_labels_come_back_as_they_were_given(model, toy_data, tmp_path, labels):
    images, _ = pictures(toy_data, [0, 1])
    expected = [label.item() if hasattr(label, "item") else label for label in labels]
    assert model.fit(images, labels).predict(images) == expected
    model.save_pretrained(tmp_path)
    assert MetaLoRAForFewShotClassification.from_pretrained(tmp_path).predict(images) == expected


def test_a_fitted_task_is_saved_and_forgotten_with_it(model, toy_data, tmp_path, student):
    images, labels = pictures(toy_data, [0, 4, 6])
    model.fit(images, labels).save_pretrained(tmp_path)
    loaded = MetaLoRAForFewShotClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.predict_proba(images), model.predict_proba(images))
    loaded.add_classes(*pictures(toy_data, [1]))
    assert loaded.label_names == ["n0", "n4", "n6", "n1"]
    student.to_model().save_pretrained(tmp_path)
    with pytest.raises(DataError, match="has no task yet"):
        MetaLoRAForFewShotClassification.from_pretrained(tmp_path).predict(images)


def test_a_damaged_task_is_refused(model, toy_data, tmp_path):
    model.fit(*pictures(toy_data, [0, 1])).save_pretrained(tmp_path)
    (tmp_path / "few_shot_task.safetensors").write_bytes(b"junk")
    with pytest.raises(AdapterError, match="few_shot_task.safetensors is not the one that .* was saved with"):
        MetaLoRAForFewShotClassification.from_pretrained(tmp_path)
    repair_checksums(tmp_path)
    with pytest.raises(AdapterError, match="the fitted task cannot be read"):
        MetaLoRAForFewShotClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "the sidecar is damaged"),
        ("[]", "must hold a JSON object"),
        ('{"metric": "dot"}', "unknown metric 'dot'"),
    ],
)
def test_a_damaged_sidecar_is_refused(saved, content, message):
    (saved / "meta_lora_config.json").write_text(content)
    with pytest.raises(AdapterError, match=message):
        MetaLoRAForFewShotClassification.from_pretrained(saved)


def test_without_a_sidecar_any_lora_can_be_worn(model, saved, toy_data):
    (saved / "meta_lora_config.json").unlink()
    loaded = MetaLoRAForFewShotClassification.from_pretrained(saved)
    assert (loaded.head.metric, loaded.head.temperature) == ("cosine", 0.1)


def test_support_sets_that_make_no_task(model):
    x = torch.randn(3, 3, 32, 32)
    for labels, message in (
        ([0, 0, 0], "at least two classes"),
        ([0, 1], "3 support images, but 2 labels"),
        ([0, 2, 2], r"must number the classes 0 to 1, got \[0, 2\]"),
        ([-1, 0, 1], "must number the classes 0 to 2"),
    ):
        with pytest.raises(DataError, match=message):
            model(x, torch.tensor(labels), x)


def test_bad_input_to_fit_keeps_the_fitted_task(model, toy_data):
    images, labels = pictures(toy_data, [0, 1])
    model.fit(images, labels)
    before = model.predict_proba(images)
    for bad_images, bad_labels, message in (
        (images, ["a"] * 4, "at least two classes"),
        (images[:3], labels, "3 images, but 4 labels"),
        ([], ["a", "b"], "No images were given"),
        ([np.full((32, 32, 3), 255.0)] * 2, ["a", "b"], "image 0: .* must lie between 0 and 1, .* got 255 to 255"),
        (["nowhere.png", "nor here.png"], ["a", "b"], r"nowhere.png: not a readable image \(No such file"),
        ([3, 4], ["a", "b"], "No image can be read from a int"),
        (model.preprocess(images), labels, r"image 0: .* between 0 and 1, .* forward\(support_pixel_values"),
        (torch.full((4, 3, 32, 32), torch.nan), labels, "image 0: .* between 0 and 1, .* got nan to nan"),
    ):
        with pytest.raises(DataError, match=message):
            model.fit(bad_images, bad_labels)
    assert torch.equal(model.predict_proba(images), before)


def test_nothing_can_be_asked_before_fit(model, toy_data):
    images, labels = pictures(toy_data, [0])
    for call in (lambda: model.predict(images), lambda: model.predict_proba(images), lambda: model.prototypes):
        with pytest.raises(DataError, match=r"Call fit\(images, labels\) first"):
            call()
    with pytest.raises(DataError, match="Call fit"):
        model.add_classes(images, labels)


def test_every_form_of_one_image_is_the_same(model, tmp_path):
    pixels = random_pixels(1)[0]
    array = pixels.permute(1, 2, 0).numpy()
    picture = Image.fromarray(array)
    picture.save(tmp_path / "image.png")
    expected = model.features(model.backbone.normalize(pixels[None]))
    path = tmp_path / "image.png"
    forms = [picture, array, pixels, path, str(path), array[None], pixels[None], [picture]]
    forms += [pixels / 255, pixels[None] / 255, array / 255, array[None] / 255, array.transpose(2, 0, 1)]
    forms += [(pixels / 255).half(), array.astype(np.float32) / 255]
    for form in [*forms, [array], [pixels], [str(path)], picture.convert("RGBA")]:
        torch.testing.assert_close(model.embed(form), expected, rtol=1e-4, atol=1e-4)


def test_one_large_array_is_one_image(model):
    tall = np.random.default_rng(0).integers(0, 256, (200, 90, 3)).astype(np.uint8)
    embedded = model.embed(tall)
    assert embedded.shape == (1, 32)
    torch.testing.assert_close(embedded, model.embed(Image.fromarray(tall)))
    grey = model.embed(tall[..., 0])
    torch.testing.assert_close(grey, model.embed(Image.fromarray(tall[..., 0]).convert("RGB")))


def test_modes_and_sizes_are_converted(model):
    colour = np.full((40, 70, 4), 90, dtype=np.uint8)
    expected = model.embed(Image.new("RGB", (32, 32), (90, 90, 90)))
    for image in (
        Image.new("L", (50, 20), 90),
        Image.fromarray(colour[..., :3]),
        colour[..., 0],
        colour[..., :1],
        torch.from_numpy(colour[..., 0])[None],
        Image.new("RGB", (32, 32), (90, 90, 90)).quantize(4),
    ):
        torch.testing.assert_close(model.embed([image]), expected, rtol=1e-3, atol=1e-3)


def test_embedding_does_not_depend_on_the_batch(model):
    pixels = random_pixels(5)
    torch.testing.assert_close(model.embed(pixels, batch_size=2), model.embed(pixels), rtol=1e-4, atol=1e-5)


def test_a_base_model_can_be_given(saved, tiny_backbone_path, tmp_path):
    config = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(AdapterError, match=r"names no base model. Pass base_model="):
        MetaLoRAForFewShotClassification.from_pretrained(saved)
    loaded = MetaLoRAForFewShotClassification.from_pretrained(saved, base_model=tiny_backbone_path)
    assert loaded.features(torch.randn(1, 3, 32, 32)).shape == (1, 32)


def test_a_truncated_adapter_is_refused(saved):
    path = saved / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(AdapterError, match="truncated or damaged"):
        MetaLoRAForFewShotClassification.from_pretrained(saved)
