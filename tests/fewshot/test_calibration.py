"""Temperatures of fitted tasks."""

import pytest
import torch

from lora_recycle.fewshot.calibration import FACTORS, ONE_SHOT_FACTOR, best_factor, leave_one_out, support_factor
from lora_recycle.fewshot.heads import DiscriminantHead, PrototypeHead


LABELS = torch.tensor([0, 0, 0, 1, 1, 1])


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_each_image_is_scored_by_prototypes_made_without_it(metric):
    head, features = PrototypeHead(metric), torch.randn(6, 5)
    scores = leave_one_out(head, features, LABELS, 2)
    for left_out in range(6):
        kept = torch.arange(6) != left_out
        alone = head.classify(features[kept], LABELS[kept], 2, features[~kept])
        torch.testing.assert_close(scores[left_out], alone[0])


def test_the_factor_is_large_where_the_support_set_is_confused_and_small_where_it_agrees():
    shown = torch.tensor([[8.0, 0.0], [0.0, 8.0]])
    assert best_factor(shown[LABELS], 1 - LABELS) > 1 > best_factor(shown[LABELS] / 8, LABELS)
    assert best_factor(1e6 * shown[LABELS], LABELS) in FACTORS


def test_classes_of_one_image_and_other_heads_have_a_fixed_factor():
    features = torch.randn(6, 5)
    assert support_factor(PrototypeHead(), features[:4], LABELS[:4], 2) == ONE_SHOT_FACTOR
    assert support_factor(DiscriminantHead(), features, LABELS, 2) == 1.0
