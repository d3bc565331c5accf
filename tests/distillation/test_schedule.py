"""Step sizes worked out by hand."""

import pytest

from lora_recycle.distillation.config import DistillationConfig
from lora_recycle.distillation.schedule import learning_rate


def test_cosine():
    config = DistillationConfig(steps=100, lr=1.0)
    values = [learning_rate(config, step) for step in range(100)]
    assert values[0] == pytest.approx(0.2) and values[4] == pytest.approx(0.996, abs=1e-3)  # 5 steps of warm-up
    assert values[50] == pytest.approx(0.5) and 0 < values[99] < 1e-3
    assert values[5:] == sorted(values[5:], reverse=True)


def test_the_papers_cycle():
    config = DistillationConfig(steps=300, lr=1e-3, schedule="cyclic")
    assert learning_rate(config, 0) == pytest.approx(1e-5)
    assert learning_rate(config, 10) == pytest.approx(1e-5 + 0.4 * (1e-3 - 1e-5))
    assert learning_rate(config, 25) == pytest.approx(1e-3)
    assert learning_rate(config, 50) == pytest.approx(1e-5 + 0.75 * (1e-3 - 1e-5))  # cos(pi / 3) = 1/2
    assert learning_rate(config, 75) == pytest.approx(1e-5 + 0.25 * (1e-3 - 1e-5))  # cos(2 pi / 3) = -1/2
    assert 1e-5 < learning_rate(config, 99) < 1.05e-5  # at its floor, where the next one begins
    assert [learning_rate(config, s) for s in range(100)] == [learning_rate(config, s) for s in range(100, 200)]


@pytest.mark.parametrize("lr", [1e-6, 1e-5, 1e-3, 0.5])
def test_a_cycle_never_leaves_its_bounds(lr):
    config = DistillationConfig(steps=100, lr=lr, schedule="cyclic")
    values = [learning_rate(config, step) for step in range(100)]
    assert min(values) == values[0] == pytest.approx(lr / 100) and max(values) == values[25] == pytest.approx(lr)
    assert values[:26] == sorted(values[:26]) and values[25:] == sorted(values[25:], reverse=True)
