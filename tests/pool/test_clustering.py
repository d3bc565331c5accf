"""Similarity in blocks against the same with dense matrices, whatever the size of the blocks."""

import pytest
import torch
from helpers_tiny import planted_adapter, random_factors, tiny_backbone

from lora_recycle.pool import clustering
from lora_recycle.pool.clustering import (
    average_linkage_groups,
    groups_by_sample,
    similarity_of_changes,
    split_by_sample,
    split_group,
)
from lora_recycle.pool.pool import AdapterPool


ONE, TWO = "layers.0.fc1", "layers.1.fc2"


def many(ranks: list[int], count: int = 9):
    """Adapters of a 24x16 and a 8x40 module; every third has only the first, every fourth only the second."""
    adapters = []
    for i in range(count):
        shapes = {ONE: (24, ranks[i % len(ranks)], 16), TWO: (8, ranks[(i + 1) % len(ranks)], 40)}
        for module in [TWO] * (i % 3 == 2) or [ONE] * (i % 4 == 3):
            del shapes[module]
        adapters.append(planted_adapter(f"a{i}", random_factors(shapes, seed=i)))
    return adapters


def dense_similarity(adapters) -> torch.Tensor:
    result = torch.zeros(len(adapters), len(adapters))
    for i, one in enumerate(adapters):
        for j, two in enumerate(adapters):
            shared = sorted(one.factors.keys() & two.factors.keys())
            changes = [[(a.factors[m][0] @ a.factors[m][1]).flatten() for a in (one, two)] for m in shared]
            cosines = [torch.cosine_similarity(x, y, dim=0).item() for x, y in changes]
            result[i, j] = sum(cosines) / len(cosines) if cosines else 0.0
    return result


@pytest.mark.parametrize("rows, numbers", [(1024, 2**22), (5, 2**22), (1024, 700), (1, 1)])
@pytest.mark.parametrize("ranks", [[1, 2, 3], [2, 16], [16]], ids=["low", "mixed", "full"])
def test_blocks_of_any_size_give_the_similarity_of_the_dense_changes(monkeypatch, ranks, rows, numbers):
    monkeypatch.setattr(clustering, "BLOCK_ROWS", rows)
    monkeypatch.setattr(clustering, "BLOCK_NUMBERS", numbers)
    adapters = many(ranks)
    torch.testing.assert_close(
        similarity_of_changes(iter(adapters), len(adapters)), dense_similarity(adapters), rtol=1e-5, atol=1e-5
    )


def test_each_adapter_is_taken_once_and_nothing_is_left_behind(monkeypatch, tmp_path):
    monkeypatch.setattr(clustering, "BLOCK_ROWS", 2)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    seen = []
    similarity_of_changes((seen.append(a.info.name) or a for a in many([2])), 9)
    assert seen == [f"a{i}" for i in range(9)] and not list(tmp_path.iterdir())


def test_a_change_of_zero_is_like_nothing():
    zero = planted_adapter("zero", {ONE: (torch.zeros(24, 2), torch.randn(2, 16))})
    similarity = similarity_of_changes([zero, *many([2], 3)], 4)
    assert similarity.isfinite().all() and not similarity[0].any() and similarity[1, 1] == pytest.approx(1)


def test_groups_are_cut_where_the_similarity_falls_most():
    similarity = torch.full((5, 5), 0.02)
    similarity[:3, :3], similarity[3:, 3:] = 0.4, 0.3
    assert average_linkage_groups(similarity) == [[0, 1, 2], [3, 4]]
    assert average_linkage_groups(torch.full((5, 5), 0.4)) == [[0, 1, 2, 3, 4]]
    assert average_linkage_groups(torch.ones(2, 2)) == [[0, 1]]


def planted_pool(sizes: list[int], seed: int = 0, noise: float = 0.03) -> AdapterPool:
    """Adapters of some directions each, shuffled; the last of `sizes` lies near the first."""
    centres = [random_factors({ONE: (24, 4, 16)}, seed=100 + c)[ONE] for c in range(len(sizes))]
    centres[-1] = tuple(a + 0.4 * b for a, b in zip(centres[0], centres[-1], strict=True))
    owners = [c for c, size in enumerate(sizes) for _ in range(size)]
    owners = [owners[i] for i in torch.randperm(len(owners), generator=torch.Generator().manual_seed(seed)).tolist()]
    adapters = []
    for i, owner in enumerate(owners):
        b, a = centres[owner]
        shaken = random_factors({ONE: (24, 4, 16)}, seed=i, scale=noise)[ONE][0]
        adapters.append(planted_adapter(f"a{i}", {ONE: (b + shaken, a)}))
    return AdapterPool(tiny_backbone(), adapters)


@pytest.mark.parametrize(
    ("sizes", "noise"),
    [([30, 20, 10], 0.03), ([40, 40], 0.05), ([25, 15, 12, 8, 6], 0.04), ([50], 0.03), ([30, 30], 0.3)],
)
@pytest.mark.parametrize("references", [64, 4])
def test_a_sample_gives_the_groups_of_all_pairs(monkeypatch, sizes, noise, references):
    exact = planted_pool(sizes, noise=noise).groups()
    monkeypatch.setattr("lora_recycle.pool.pool.LARGEST_EXACT", 20)
    monkeypatch.setattr(clustering, "LARGEST_EXACT", 20)
    monkeypatch.setattr(clustering, "REFERENCES", references)
    monkeypatch.setattr(clustering, "_TOGETHER", 7)
    assert planted_pool(sizes, noise=noise).groups() == exact
    assert sorted(i for group in exact for i in group) == list(range(sum(sizes)))


def test_a_sample_gives_the_halves_of_all_pairs(monkeypatch):
    pool = planted_pool([30, 20, 0])
    similarity, everyone = pool.similarity(), list(range(len(pool)))
    exact = split_group(similarity, everyone)
    assert exact is not None and sorted(map(len, exact)) == [20, 30] and pool.halves(everyone) == exact
    monkeypatch.setattr("lora_recycle.pool.pool.LARGEST_EXACT", 20)
    monkeypatch.setattr(clustering, "LARGEST_EXACT", 20)
    assert sorted(pool.halves(everyone)) == sorted(exact)
    part = everyone[:16]  # small enough for all pairs, of a pool that is not
    assert pool.halves(part) == split_group(similarity, part)
    assert split_by_sample(lambda chosen: torch.ones(len(chosen), len(chosen)), everyone) is None


def test_work_grows_with_the_number_of_adapters_alone(monkeypatch):
    monkeypatch.setattr(clustering, "LARGEST_EXACT", 20)
    monkeypatch.setattr(clustering, "REFERENCES", 4)
    monkeypatch.setattr(clustering, "_TOGETHER", 10)
    pairs = {}
    for count in (200, 400):
        seen = []

        def similarity_of(chosen, seen=seen):
            seen.append(len(chosen) ** 2)
            owner = torch.tensor(chosen) % 2
            return 0.01 + 0.9 * (owner[:, None] == owner).float()

        groups = groups_by_sample(similarity_of, count)
        assert groups == [list(range(0, count, 2)), list(range(1, count, 2))]
        pairs[count] = sum(seen)
    assert pairs[400] < 2.2 * pairs[200]
