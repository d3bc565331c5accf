"""Numbers that are not finite are an error that says where to look, and never an answer."""

import math

import pytest
import torch
from helpers_tiny import random_pixels

from lora_recycle.backbones.backbone import extract_features
from lora_recycle.errors import AdapterError, DataError
from lora_recycle.modeling.meta_lora import MetaLoRAForFewShotClassification


LOOK = "embeddings are not finite. Look at the weights of the base model and of the adapter"


@pytest.fixture
def model(folder):
    return MetaLoRAForFewShotClassification.from_pretrained(folder)


def spoil(model, value):
    with torch.no_grad():
        model.backbone.model.layernorm.weight.fill_(value)


@pytest.mark.parametrize("value", [1e38, 1e25, math.nan, math.inf])
def test_huge_weights_are_told_by_every_way_to_an_answer(model, value):
    images, labels = random_pixels(4), ["a", "a", "b", "b"]
    task = model.new_task().fit(images, labels)
    model.fit(images, labels)
    pixel_values = model.preprocess(images)
    spoil(model, value)
    numbers = torch.tensor([0, 0, 1, 1])
    for ask in (
        lambda: model.fit(images, labels),
        lambda: model.tune(images, labels),
        lambda: model.predict(images),
        lambda: model.predict_proba(images),
        lambda: model.similarity(images),
        lambda: model.add_classes(images, labels),
        lambda: task.predict(images),
        lambda: model.predict_tasks(images, [task] * 4),
        lambda: model(pixel_values, numbers, pixel_values),
        lambda: extract_features(model.backbone, images),
    ):
        with pytest.raises(AdapterError, match=LOOK):
            ask()


def test_images_that_are_not_finite_are_the_images_fault(model):
    pixel_values, numbers = model.preprocess(random_pixels(4)), torch.tensor([0, 0, 1, 1])
    with pytest.raises(DataError, match="The images hold NaN or infinity"):
        model(pixel_values, numbers, torch.full_like(pixel_values, math.nan))


def test_probabilities_of_embeddings_are_finite_or_refused(model):
    images = random_pixels(4)
    model.fit(images, ["a", "a", "b", "b"])
    features = model.features(model.preprocess(images))
    torch.testing.assert_close(model.probabilities(features), model.predict_proba(images))
    with pytest.raises(AdapterError, match="Class probabilities are not finite. Look at the embeddings"):
        model.probabilities(torch.full_like(features, math.nan))
