"""What users of scikit-learn and transformers expect of a model."""

import warnings

import pytest
import sklearn
import torch
from sklearn.model_selection import cross_val_score

from lora_recycle import MetaLoRAForFewShotClassification
from lora_recycle.backbones.base_models import BaseModel
from lora_recycle.errors import ConfigError, DataError
from lora_recycle.pool.training import load_classifier


@pytest.fixture(scope="module")
def frozen(tiny_backbone_path):
    return MetaLoRAForFewShotClassification.from_backbone(tiny_backbone_path)


@pytest.fixture(scope="module")
def photos(toy_data):
    """Images (24, 3, 32, 32) of three classes, and their names."""
    rows = torch.cat([(toy_data.labels == label).nonzero().flatten()[:8] for label in range(3)])
    return toy_data.pixels[rows], [f"class {label}" for label in toy_data.labels[rows].tolist()]


def test_score_is_the_share_of_right_answers(frozen, photos):
    images, labels = photos
    frozen.fit(images[::2], labels[::2])
    right = [a == b for a, b in zip(frozen.predict(images, batch_size=5), labels, strict=True)]
    assert frozen.score(images, labels) == sum(right) / len(right) > 1 / 3
    assert frozen.score(images[:1], ["class 1"]) == 0
    with pytest.raises(DataError, match="does not know the label 'Class 1'.*'class 0', 'class 1'"):
        frozen.score(images[:1], ["Class 1"])


def test_a_model_is_a_classifier_of_scikit_learn(frozen, photos):
    images, labels = photos
    copy = sklearn.base.clone(frozen.fit(images, labels))
    assert copy.label_names == [] and copy.model is frozen and frozen.get_params() == {}
    assert frozen.classes_.tolist() == frozen.label_names and not hasattr(copy, "classes_")
    assert sklearn.base.is_classifier(copy)
    scores = cross_val_score(frozen, list(images.permute(0, 2, 3, 1).numpy()), labels, cv=2)
    assert scores.shape == (2,) and scores.min() > 1 / 3
    with pytest.raises(ConfigError, match="no parameter 'head'"):
        frozen.set_params(head="lda")


def test_a_frozen_backbone_is_a_model_without_anything_to_save_or_tune(frozen, photos, tmp_path):
    images, labels = photos
    assert frozen.frozen and frozen.merge() is frozen
    torch.testing.assert_close(frozen.embed(images), frozen.backbone.features(frozen.preprocess(images)))
    for call in (lambda: frozen.save_pretrained(tmp_path), lambda: frozen.push_to_hub("org/name")):
        with pytest.raises(ConfigError, match="no meta-LoRA to save"):
            call()
    with pytest.raises(ConfigError, match="no adapter to tune"):
        frozen.tune(images, labels)
    assert not list(tmp_path.iterdir())


def test_reprs_are_short(frozen, photos):
    model = frozen.fit(*photos)
    assert "classes=['class 0', 'class 1', 'class 2']" in repr(model) and "frozen backbone=" in repr(model)
    assert repr(model.new_task()) == "SharedTask(not fitted)"
    assert max(map(len, (repr(model), repr(model.backbone)))) < 300


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device_map": "auto"}, "Pass device"),
        ({"dtype": torch.float32, "torch_dtype": torch.float32}, "Pass dtype alone"),
        ({"dtype": "float8"}, "bfloat16"),
        ({"subfolder": "none"}, "no local folder 'none'"),
    ],
)
def test_options_of_transformers_work_or_name_ours(tiny_backbone_path, options, message):
    with pytest.raises(ConfigError, match=message):
        MetaLoRAForFewShotClassification.from_backbone(tiny_backbone_path, **options)


def test_transformers_names_of_dtype_and_folder(tiny_backbone_path):
    parent, name = tiny_backbone_path.parent, tiny_backbone_path.name
    model = MetaLoRAForFewShotClassification.from_backbone(parent, subfolder=name, torch_dtype="bfloat16")
    assert model.backbone.dtype == torch.bfloat16


def test_loading_says_nothing(tiny_backbone_path, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_classifier(BaseModel.pull(tiny_backbone_path), ["cat", "dog"])
    assert "".join(capfd.readouterr()) == ""
