"""The scripts behind docs/studies/merging.md and checkpoints.md, on tiny inputs."""

import common
import group_weights
import pytest
import torch
from choose_without_images import FIGURES, RUNS, Judge, summary
from more_tables import figures as figures_table
from more_tables import group_weights as weights_table

from lora_recycle.distillation.config import DistillationConfig
from lora_recycle.distillation.trainer import MetaLoRATrainer
from lora_recycle.fewshot.episodes import sample_episodes


def test_students_are_looked_at_by_surrogate_and_by_real_images(tiny_pool, tiny_surrogate, toy_data):
    episodes = {("toy", k): sample_episodes(toy_data.labels, 5, k, 5, 10, seed=1) for k in (1, 5)}
    look = Judge(tiny_surrogate, tiny_pool.subset([0]), tiny_pool.subset([1]), [toy_data], episodes, {1, 3})
    config = DistillationConfig(steps=3, rank=4, relational_batch=16, groups="one", validation_fraction=0.0, lr=0.05)
    MetaLoRATrainer(tiny_pool.subset([1, 2, 3]), tiny_surrogate, config, [look]).train(progress=False)
    assert [point["step"] for point in look.points] == [1, 3]
    first, last = look.points
    assert all(first[figure] != last[figure] for figure in ("divergence", "divergence, taught", "episode loss"))
    assert 0 <= last["episode error"] <= 100 and last["real"].keys() == {"toy 1", "toy 5"}
    own = tiny_pool[0]
    with tiny_pool.folded([own]) as backbone, torch.inference_mode():
        figures = look._figures(backbone, look.unseen[0])
    assert figures["divergence"] < last["divergence"]  # the adapter agrees with itself, but for the masks


def test_a_figure_that_tells_and_one_that_does_not():
    def point(step, gain, figure):
        return {"step": step, "real": {"a 1": 50 + gain}} | dict.fromkeys(FIGURES, 0.0) | {"episode error": figure}

    learners = [name for name in RUNS if "kl_weight" not in RUNS[name]][:4]
    runs = {
        name: [point(0, 0, 10), point(9, gain, 10 - gain)] for name, gain in zip(learners, (2, 1, -1, -2), strict=True)
    }
    others = [name for name in RUNS if "kl_weight" in RUNS[name]][:2]
    runs |= {name: [point(0, 0, 10), point(9, gain, 10 + gain)] for name, gain in zip(others, (1, -1), strict=True)}
    found = summary(runs)
    good, bad = (found["kinds"][kind]["figures"]["episode error"] for kind in ("similarities", "episodes"))
    assert good["rank correlation"] == pytest.approx(1) and bad["rank correlation"] == pytest.approx(-1)
    assert (good["said to be better than the start"], good["and were"], good["their mean gain"]) == (2, 2, 1.5)
    assert (bad["said to be better than the start"], bad["and were"], bad["their mean gain"]) == (1, 0, -1)
    table = figures_table(found)
    assert "| similarities | episode error | +1.00 | 2 of 2 | +1.50 |" in table
    assert "| episodes | episode error | -1.00 | 0 of 1 | -1.00 |" in table


def test_groups_are_merged_at_their_strengths(tiny_pool):
    averages = [group_weights.average_of(tiny_pool, (f"adapter-{i}",)) for i in (0, 1)]
    merged = common.Weighted(averages, (1, 0.5), None).changes(tiny_pool)
    shared = next(name for name in averages[1] if name in averages[0])
    assert torch.allclose(merged[shared], averages[0][shared] + 0.5 * averages[1][shared])
    small = common.cut(averages[0], 2)
    assert max(int(torch.linalg.matrix_rank(m, rtol=1e-4)) for m in small.values() if m.ndim == 2) == 2
    tasks = {f"a {shots}": {"frozen": [1.0, 0.1], "average": [0.5, 0.1]} for shots in (1, 5)}
    row = {"name": "group-sum, cut 4", "factors": [1, 1 / 3], "rank": 4, "tasks": tasks}
    table = weights_table({"groups": {"photos": [], "flowers": []}, "rows": [row, row]})
    assert "| group-sum, cut to rank 4 | 1 / 0.33 | +1.0 ± 0.1 / +1.0 ± 0.1 |" in table


def test_a_regression_gives_each_group_its_own_change_where_its_inputs_are(tiny_pool, monkeypatch):
    monkeypatch.setattr(group_weights, "RIDGE", 1e-9)
    pixels = torch.randint(0, 256, (4, 3, tiny_pool.backbone.image_size, tiny_pool.backbone.image_size))
    products = group_weights.input_products(tiny_pool, {}, pixels.to(torch.uint8))
    name, change = next((n, c) for n, c in group_weights.average_of(tiny_pool, ("adapter-0",)).items() if c.ndim == 2)
    assert (
        products[name].shape == (change.shape[1],) * 2 and torch.linalg.eigvalsh(products[name].double()).min() > -1e-3
    )
    first = torch.arange(change.shape[1]) < change.shape[1] // 2  # one group's inputs, and the other's
    seen = [{name: first.float().diag()}, {name: (~first).float().diag()}]
    merged = group_weights.Regressed([{name: change}, {name: -change}], (1, 1), seen).changes(tiny_pool)
    torch.testing.assert_close(merged[name], torch.where(first, change, -change), rtol=1e-4, atol=1e-6)
    mean = group_weights.Regressed([{name: change}, {name: -change}], (3, 1), [seen[0]] * 2).changes(tiny_pool)
    torch.testing.assert_close(mean[name][:, first], change[:, first] / 2, rtol=1e-4, atol=1e-6)
