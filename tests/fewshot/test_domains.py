"""The choice of a domain, on angles worked out by hand."""

import math

import pytest
import torch

from lora_recycle.errors import DataError
from lora_recycle.fewshot.domains import (
    SHARED,
    DomainRule,
    Expert,
    choose_domain,
    class_spread,
    displacement,
    separability,
)


LABELS = torch.tensor([0, 1])


def at(*degrees):
    """Features of length 2 in these directions."""
    angles = torch.tensor(degrees).deg2rad()
    return 2 * torch.stack([angles.cos(), angles.sin()], 1)


#: 60 degrees between the classes; the shared network moves each image by 10 degrees and makes that 80.
FROZEN, SHARED_LOOK = at(0.0, 60.0), at(-10.0, 70.0)
#: Moves each image by 30 degrees and makes it 120; moves them as far, but leaves 60.
APART, TURNED = at(-30.0, 90.0), at(30.0, 90.0)


def chosen(looks, experts, reference_spread=0.8, **options):
    choice = choose_domain(FROZEN, SHARED_LOOK, looks, LABELS, experts, reference_spread, **options)
    return choice.name


def cosine(degrees):
    return math.cos(math.radians(degrees))


def test_separability_by_hand():
    features = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0], [3.0, 4.0]])
    labels = torch.tensor([0, 0, 1, 1])
    # within: 1 and 0.8; between: 0, 0.6 twice
    assert separability(features, labels).item() == pytest.approx(0.9 - 0.3, abs=1e-6)
    assert separability(features[1:3], labels[1:3]).item() == pytest.approx(1.0)
    assert separability(features[[0, 3]], torch.tensor([5, 2])).item() == pytest.approx(0.4, abs=1e-6)
    with pytest.raises(DataError, match="at least 2 classes"):
        separability(features, torch.zeros(4, dtype=torch.long))


def test_displacement_and_spread_by_hand():
    assert displacement(at(0.0, 90.0), at(60.0, 0.0)).item() == pytest.approx((0.5 + 1) / 2, abs=1e-6)
    assert displacement(FROZEN, 5 * FROZEN).item() == pytest.approx(0, abs=1e-6)
    assert class_spread(at(0.0, 0.0, 60.0), torch.tensor([0, 0, 1])).item() == pytest.approx(0.5, abs=1e-6)


def test_a_group_that_moves_and_separates_is_chosen_with_its_scores():
    choice = choose_domain(FROZEN, SHARED_LOOK, {"birds": APART}, LABELS, [Expert("birds", "group", 0.2)], 0.8)
    separates = math.log((1 - cosine(120)) / (1 - cosine(80)))  # one image of each class: 1 within
    moves = math.log((1 - cosine(30)) / (1 - cosine(10)))
    assert choice.name == "birds"
    assert choice.scores["birds"] == pytest.approx({"separability": separates, "displacement": moves}, abs=1e-4)


def test_a_group_that_fails_either_threshold_leaves_the_shared_network():
    assert chosen({"birds": TURNED}, [Expert("birds", "group", 0.2)]) == SHARED  # moves, but does not separate
    # the displacement is 2.18; averaging over a pool of which the group is a hundredth divides by 100
    assert chosen({"birds": APART}, [Expert("birds", "group", 0.01)]) == SHARED
    assert chosen({"birds": APART}, [Expert("birds", "group", 0.01)], rule=DomainRule(displacement=0.4)) == "birds"
    assert chosen({"birds": SHARED_LOOK}, [Expert("birds", "group", 0.2)]) == SHARED
    assert chosen({"birds": FROZEN}, [Expert("birds", "group", 0.2)]) == SHARED  # an expert that changes nothing


def test_of_several_groups_the_one_that_separates_best_is_chosen():
    experts = [Expert("birds", "group", 0.2), Expert("cars", "group", 0.3)]
    looks = {"birds": APART, "cars": at(-60.0, 30.0)}  # moves further, leaves 90 degrees
    assert chosen(looks, experts) == "birds"
    assert chosen({"birds": looks["cars"], "cars": looks["birds"]}, experts) == "cars"


PART, OTHER = at(-25.0, 85.0), at(-20.0, 80.0)
HALVES = [Expert("dogs", "part", 0.4), Expert("rest", "compared", 0.3)]


def test_a_part_is_chosen_where_it_leads():
    assert chosen({"dogs": PART, "rest": OTHER}, HALVES) == "dogs"
    assert chosen({"dogs": OTHER, "rest": PART}, HALVES) == SHARED  # the other half is never chosen
    assert chosen({"dogs": PART, "rest": PART}, HALVES) == SHARED
    assert chosen({"dogs": at(25.0, 85.0), "rest": OTHER}, HALVES) == SHARED  # leads, but separates worse
    assert chosen({"dogs": PART}, HALVES[:1]) == SHARED  # nothing to lead


def test_a_part_needs_classes_that_spread():
    # the bare backbone spreads these classes by 0.5: more than 0.57 x 0.8, less than 0.57 x 0.9
    assert chosen({"dogs": PART, "rest": OTHER}, HALVES, 0.8) == "dogs"
    assert chosen({"dogs": PART, "rest": OTHER}, HALVES, 0.9) == SHARED
    # a group does not ask for it
    experts = [*HALVES, Expert("birds", "group", 0.2)]
    assert chosen({"dogs": PART, "rest": OTHER, "birds": APART}, experts, 0.9) == "birds"


def test_a_pool_of_one_group_never_routes():
    assert chosen({}, []) == SHARED


def test_the_choice_depends_on_neither_order_nor_lengths():
    torch.manual_seed(0)
    frozen, labels = torch.randn(12, 8), torch.arange(4).repeat(3)
    shared = frozen + 0.3 * torch.randn(12, 8)
    looks = {"a": frozen + torch.randn(12, 8), "b": frozen + 0.5 * torch.randn(12, 8)}
    experts = [Expert("a", "group", 0.3), Expert("b", "group", 0.3)]
    order = torch.randperm(12)
    one = choose_domain(frozen, shared, looks, labels, experts, 0.8)
    turned = {name: 7 * look[order] for name, look in looks.items()}
    two = choose_domain(3 * frozen[order], shared[order], turned, labels[order], experts, 0.8)
    assert one.name == two.name
    for name in looks:
        assert one.scores[name] == pytest.approx(two.scores[name], abs=1e-4)


def test_one_class_is_an_error():
    with pytest.raises(DataError, match="at least 2 classes"):
        choose_domain(FROZEN, SHARED_LOOK, {}, torch.zeros(2, dtype=torch.long), [], 0.8)
