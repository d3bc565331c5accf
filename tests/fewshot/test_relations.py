"""Similarities of a batch: by hand, concatenated, compressed."""

import math

import pytest
import torch
import torch.nn.functional as F

from lora_recycle.fewshot.prototypes import class_prototypes, prototype_logits
from lora_recycle.fewshot.relations import (
    cosine_similarity,
    principal_directions,
    relational_divergence,
    relational_divergence_to,
)


def test_equal_similarities_have_no_divergence():
    features = torch.randn(6, 8)
    rotation = torch.linalg.qr(torch.randn(8, 8)).Q
    assert relational_divergence(features, features).item() == pytest.approx(0, abs=1e-6)
    assert relational_divergence(3 * features @ rotation, features).item() == pytest.approx(0, abs=1e-5)


def test_three_points_by_hand():
    student = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    teacher = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 0.0]])
    # similarities to the two others, student: (0, 1), (0, 0), (1, 0); teacher: (0, -1), (0, 0), (-1, 0)
    high = 1 / (1 + math.exp(-2.0))  # softmax of 2 x (1, 0)
    each = high * math.log(high / (1 - high)) + (1 - high) * math.log((1 - high) / high)
    value = relational_divergence(student, teacher, scale=2.0).item()
    assert value == pytest.approx((each + 0 + each) / 3, rel=1e-5)
    assert relational_divergence_to(student, cosine_similarity(teacher), 2.0).item() == pytest.approx(value)


def test_the_gradient_goes_to_the_student_and_lowers_the_loss():
    student, teacher = torch.randn(8, 4, requires_grad=True), torch.randn(8, 4)
    loss = relational_divergence(student, teacher)
    loss.backward()
    with torch.no_grad():
        assert relational_divergence(student - 0.05 * student.grad, teacher) < loss


def test_concatenated_unit_features_have_the_mean_cosine():
    members = [F.normalize(torch.randn(7, d), dim=-1) for d in (4, 9, 5)]
    joined = torch.cat(members, 1) / 3**0.5
    mean = torch.stack([m @ m.T for m in members]).mean(0)
    torch.testing.assert_close(joined @ joined.T, mean)
    torch.testing.assert_close(cosine_similarity(joined), mean)
    student = torch.randn(7, 6)
    torch.testing.assert_close(relational_divergence(student, joined), relational_divergence_to(student, mean))


def test_compression_keeps_inner_products():
    features = torch.randn(60, 6) @ torch.randn(6, 40)
    directions = principal_directions(features, dim=8)
    assert directions.shape == (40, 8)
    small = features @ directions
    torch.testing.assert_close(small @ small.T, features @ features.T, rtol=1e-3, atol=1e-2)
    assert torch.equal(directions, principal_directions(features, dim=8))
    assert principal_directions(features, dim=40) is None and principal_directions(features[:5], dim=8) is None


def test_prototypes_and_scores_by_hand():
    features = torch.tensor([[1.0, 0], [3, 0], [0, 2]])
    prototypes = class_prototypes(features, torch.tensor([0, 0, 1]), 2)
    assert prototypes.tolist() == [[2, 0], [0, 2]]
    query = torch.tensor([[2.0, 2.0]])
    torch.testing.assert_close(prototype_logits(query, prototypes, temperature=0.5), torch.full((1, 2), 2**0.5))
    torch.testing.assert_close(prototype_logits(query, prototypes, "euclidean", 0.5), torch.full((1, 2), -4.0))
