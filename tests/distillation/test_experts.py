"""Experts of a pool: which domains it has, what they are called, and that each is the average of its adapters."""

import pytest
import torch
from helpers_domains import MEMBERS, domain_pool
from helpers_tiny import random_pixels, tiny_backbone

from lora_recycle import DistillationConfig, MetaLoRATrainer
from lora_recycle.backbones.backbone import extract_features
from lora_recycle.distillation.experts import domain_names, expert_networks, pool_domains, reference_spread
from lora_recycle.fewshot.domains import Expert


@pytest.fixture(scope="module")
def pool():
    return domain_pool(tiny_backbone())


def test_the_largest_group_has_its_halves_and_every_other_group_itself(pool):
    found = pool_domains(pool)
    assert [group for _, group in found] == list(MEMBERS.values())
    assert [expert for expert, _ in found] == [
        Expert("dogs", "part", 3 / 9),
        Expert("rest", "compared", 2 / 9),
        Expert("birds", "group", 2 / 9),
        Expert("cars", "group", 2 / 9),
    ]


def test_groups_that_are_equally_large_are_all_groups(pool):
    experts = [expert for expert, _ in pool_domains(pool.subset([5, 6, 7, 8]))]
    assert experts == [Expert("birds", "group", 0.5), Expert("cars", "group", 0.5)]


def test_a_uniform_largest_group_has_no_expert(pool):
    assert [expert.name for expert, _ in pool_domains(pool.subset([0, 1, 2, 5, 6]))] == ["birds"]


def test_a_pool_of_one_group_has_none(pool):
    assert (
        pool_domains(pool.subset([0, 1, 2])) == []
        and expert_networks(pool.subset([0, 1, 2]), pool.backbone, 4) is None
    )


def test_names_are_what_adapters_have_in_common():
    assert domain_names([["org/cars-01", "org/cars-02"], ["vit_birds.3"]]) == ["cars", "vit_birds"]
    assert domain_names([["adapter-0", "adapter-1"], ["adapter-2"]]) == ["domain-1", "domain-2"]
    assert domain_names([["ab-1", "xy-1"], ["shared-1", "shared-2"]]) == ["domain-1", "domain-2"]


def test_each_expert_is_the_average_of_its_adapters(pool):
    images = random_pixels(4)
    frozen = extract_features(pool.backbone, images)
    networks = expert_networks(pool, pool.backbone, 16)
    assert networks.names == list(MEMBERS)
    assert torch.equal(extract_features(networks.frozen, images), frozen)
    for name, group in MEMBERS.items():
        with pool.subset(group).folded() as backbone:
            expected = extract_features(backbone, images)
        assert (expected - frozen).abs().max() > 1e-2
        torch.testing.assert_close(extract_features(networks.network(name), images), expected, rtol=1e-4, atol=1e-4)


def test_all_networks_share_the_weights_of_one_backbone(pool):
    networks = expert_networks(pool, pool.backbone, 16)
    own = {id(parameter) for parameter in pool.backbone.parameters()}
    others = {id(p) for n, p in networks.named_parameters() if "lora_" not in n}
    assert others == own


def test_a_lower_rank_is_cut(pool):
    networks = expert_networks(pool, pool.backbone, 3)
    assert {network.peft_model.peft_config["default"].r for network in networks} == {3}


def test_the_reference_spread_is_that_of_all_pairs():
    spread = reference_spread(tiny_backbone())
    assert 0 < spread < 1 and spread == reference_spread(tiny_backbone())


def test_distillation_keeps_experts_unless_it_is_told_not_to(pool):
    for experts in (True, False):
        trainer = MetaLoRATrainer(pool, None, DistillationConfig(steps=0, rank=4, experts=experts))
        trainer.train(progress=False)
        assert trainer.to_model().domains == (["shared", *MEMBERS] if experts else [])
