"""Similarity in blocks against the same with dense matrices, whatever the size of the blocks."""

import pytest
import torch
from helpers_tiny import planted_adapter, random_factors

from lora_recycle.pool import clustering
from lora_recycle.pool.clustering import average_linkage_groups, similarity_of_changes


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
