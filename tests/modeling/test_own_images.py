"""`fit` and `predict` on the forms in which people keep their photos."""

import datasets
import numpy as np
import pytest
import torch
from helpers_tiny import random_pixels, tiny_backbone, tiny_vit
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import CLIPImageProcessorPil

from lora_recycle.backbones.backbone import Backbone
from lora_recycle.errors import DataError
from lora_recycle.fewshot.heads import HEADS
from lora_recycle.modeling.meta_lora import MetaLoRAForFewShotClassification


CLASSES, EACH = ("ant", "bee", "fly"), 3
SETTINGS = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}


@pytest.fixture(scope="module")
def model():
    return wrapped(tiny_backbone())


def wrapped(backbone, settings=None):
    torch.manual_seed(0)
    peft_model = get_peft_model(backbone.model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    return MetaLoRAForFewShotClassification(backbone, peft_model, settings)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """photos/train/<class>/<number>.png, and photos/test with the classes' names exchanged."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    colours = [(220, 30, 30), (30, 220, 30), (30, 30, 220)]
    for split, names in (("train", CLASSES), ("test", CLASSES[::-1])):
        for name, colour in zip(names, colours, strict=True):
            (root / split / name).mkdir(parents=True)
            for number in range(EACH):
                pixels = (np.array(colour) + rng.integers(0, 30, (40 + number, 50, 3))).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


def files_and_labels(folder):
    files = sorted(folder.glob("*/*.png"))
    return files, [file.parent.name for file in files]


def same_task(model, expected):
    assert model.label_names == expected.label_names
    assert torch.equal(model.prototypes, expected.prototypes)


def test_every_form_of_a_support_set_is_the_same_task(model, photos):
    files, labels = files_and_labels(photos / "train")
    expected = model.new_task().fit(files, labels)
    pictures = [Image.open(file) for file in files]
    arrays = [np.asarray(picture) for picture in pictures]
    table = datasets.Dataset.from_dict(
        {"image": [{"bytes": file.read_bytes(), "path": None} for file in files], "label": labels},
        features=datasets.Features(image=datasets.Image(), label=datasets.Value("string")),
    )
    typed = table.class_encode_column("label")
    for images, names in (
        (photos / "train", None),
        (str(photos), None),  # what is for learning, of a folder in splits
        ((photos / "train").as_uri(), None),
        ([file.as_uri() for file in files], labels),
        (map(str, files), iter(labels)),
        (pictures, np.array(labels)),
        (arrays, labels),
        ([torch.from_numpy(array.copy()) for array in arrays], labels),
        ([torch.from_numpy(array.copy()).permute(2, 0, 1) / 255 for array in arrays], labels),
        ([array / 255 for array in arrays], labels),
        (table, None),
        (typed, None),
        (typed.remove_columns("label"), labels),
        (datasets.DatasetDict(test=table.select([0]), train=typed), None),
    ):
        same_task(model.new_task().fit(images, names), expected)


def test_tables_on_disk(model, photos, tmp_path):
    files, labels = files_and_labels(photos / "train")
    table = datasets.Dataset.from_dict({"image": [str(file) for file in files], "label": labels})
    table = table.cast_column("image", datasets.Image())
    table.save_to_disk(str(tmp_path / "saved"))
    expected = model.new_task().fit(files, labels)
    same_task(model.new_task().fit(tmp_path / "saved"), expected)
    table.cast_column("image", datasets.Image()).to_parquet(str(tmp_path / "photos.parquet"))
    same_task(model.new_task().fit(tmp_path / "photos.parquet"), expected)


def test_numbers_stay_numbers(model, photos):
    files, labels = files_and_labels(photos / "train")
    numbers = [CLASSES.index(label) + 5 for label in labels]
    images = [{"bytes": file.read_bytes(), "path": None} for file in files]
    table = datasets.Dataset.from_dict({"image": images, "label": numbers})
    assert model.new_task().fit(table).predict(files) == numbers


def test_classes_are_added_in_the_same_forms(model, photos, tmp_path):
    files, labels = files_and_labels(photos / "train")
    expected = model.new_task().fit(files[:6], labels[:6]).add_classes(files[6:], labels[6:])
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "fly").symlink_to(photos / "train" / "fly")
    same_task(model.new_task().fit(files[:6], labels[:6]).add_classes(tmp_path / "more"), expected)


def test_queries_in_every_form_get_the_same_answers(model, photos):
    files, labels = files_and_labels(photos / "train")
    task = model.new_task().fit(files, labels)
    expected = task.predict_proba(files)
    table = datasets.Dataset.from_dict({"image": [{"bytes": file.read_bytes(), "path": None} for file in files]})
    for queries in (map(str, files), [file.as_uri() for file in files], table, [Image.open(file) for file in files]):
        assert torch.equal(task.predict_proba(queries), expected)
    assert task.predict(str(files[0])) == task.predict(files[0].as_uri()) == [labels[0]]
    assert task.predict(files[0].read_bytes()) == [labels[0]]


@pytest.mark.parametrize("head", HEADS)
def test_predict_is_the_largest_probability(head, photos):
    model = wrapped(tiny_backbone(), {"head": head})
    files, labels = files_and_labels(photos / "train")
    model.fit(files, labels)
    probabilities = model.predict_proba(files)
    assert probabilities.shape == (9, 3)
    assert model.predict(files) == [model.label_names[column] for column in probabilities.argmax(1)]


def test_ties_go_to_the_first_class_in_both(model, photos):
    files, _ = files_and_labels(photos / "train")
    twice = [files[0], files[0], files[8], files[8]]
    task = model.new_task().fit(twice, ["b", "a", "d", "c"])
    probabilities = task.predict_proba([files[0], files[8]])
    assert probabilities[0, 0] == probabilities[0, 1] and probabilities[1, 2] == probabilities[1, 3]
    assert task.predict([files[0], files[8]]) == ["a", "c"]
    assert [task.label_names[i] for i in probabilities.argmax(1)] == ["a", "c"]


def test_broken_images_are_named_or_left_out(model, photos, tmp_path):
    files, labels = files_and_labels(photos / "train")
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff\xe0")
    expected = model.new_task().fit(files, labels)
    with pytest.raises(DataError, match="broken.jpg: not a readable image"):
        model.new_task().fit([*files, broken], [*labels, "ant"])
    failures = {5: "of an earlier call"}
    task = model.new_task().fit([broken, *files], ["fly", *labels], failures=failures)
    same_task(task, expected)
    assert list(failures) == [0] and "broken.jpg" in failures[0]
    queries = [files[0], broken, files[8], None]
    with pytest.raises(DataError, match="broken.jpg"):
        task.predict(queries)
    probabilities = task.predict_proba(queries, failures=failures)
    assert list(failures) == [1, 3] and "image 3: No image can be read from a NoneType" in failures[3]
    assert probabilities.isnan().all(1).tolist() == [False, True, False, True]
    assert torch.equal(probabilities[[0, 2]], expected.predict_proba([files[0], files[8]]))
    assert task.predict(queries, failures=failures) == ["ant", None, "fly", None]
    assert task.predict([broken], failures=failures) == [None] and list(failures) == [0]
    assert task.predict(files[:2], failures=failures) == ["ant", "ant"] and failures == {}


def test_a_class_of_which_nothing_can_be_read_is_missed(model, photos, tmp_path):
    files, labels = files_and_labels(photos / "train")
    broken = tmp_path / "broken.jpg"
    broken.touch()
    with pytest.raises(DataError, match="No image of the class 'wasp' can be read. The first: .*broken.jpg"):
        model.new_task().fit([*files, broken], [*labels, "wasp"], failures={})


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (["a.png"], None, "Labels are missing: pass one for each image, or a folder with one folder"),
        ("nowhere/photos", None, "nowhere/photos: no such file or folder"),
        (5, ["a"], "No images can be read from a int"),
        ([np.zeros((4, 4), np.uint8)] * 2, ["a", None], "Labels must be names or numbers, got None"),
        ([np.zeros((4, 4), np.uint8)] * 2, ["a", ["b"]], "Labels must be names or numbers, got .'b'."),
        ([np.zeros((4, 4), np.uint8)] * 2, [1.0, float("nan")], "Labels must be names or numbers, got nan"),
    ],
)
def test_what_is_no_support_set(model, images, labels, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match=message):
        model.new_task().fit(images, labels)


def test_photos_larger_than_memory_should_hold_come_one_batch_at_a_time(photos, monkeypatch):
    """A processor that crops gets one picture at a time, whatever the batch."""
    backbone = Backbone(tiny_vit(), CLIPImageProcessorPil(**SETTINGS, image_mean=[0.5] * 3, image_std=[0.5] * 3), "c")
    model, batches = wrapped(backbone), []
    files, labels = files_and_labels(photos / "train")
    features = model.features
    monkeypatch.setattr(model, "features", lambda x, *_: batches.append(tuple(x.shape)) or features(x))
    embedded = model.embed(files, batch_size=4)
    assert batches == [(4, 3, 32, 32), (4, 3, 32, 32), (1, 3, 32, 32)]
    expected = backbone.processor(images=[Image.open(file) for file in files], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(embedded, features(expected), rtol=1e-4, atol=1e-5)


def test_a_transposed_or_masked_photo_is_classified_as_one_sees_it(model, photos, tmp_path):
    files, labels = files_and_labels(photos / "train")
    task = model.new_task().fit(files, labels)
    cut_out = Image.open(files[0]).convert("RGBA")
    cut_out.putalpha(255)
    cut_out.save(tmp_path / "whole.png")
    torch.testing.assert_close(task.predict_proba(tmp_path / "whole.png"), task.predict_proba(files[0]))
    hidden = Image.open(files[0]).convert("RGBA")
    hidden.putalpha(0)
    white = Image.new("RGB", hidden.size, "white")
    assert torch.equal(task.predict_proba(hidden), task.predict_proba(white))


@pytest.mark.parametrize(("one", "other"), [(1, "1"), (1, True), (2, 2.0), (True, "True")])
def test_labels_that_would_pass_for_one_class_are_refused(model, one, other):
    images = random_pixels(4)
    with pytest.raises(DataError, match=f"The labels .*{one!r}.* would pass for one class. Give all labels one type"):
        model.fit(images, [one, one, other, other])
    model.fit(images, [one, one, "x", "x"])
    with pytest.raises(DataError, match="would pass for one class"):
        model.add_classes(images, [other] * 4)
    assert set(model.label_names) == {one, "x"}
