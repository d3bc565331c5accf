"""The scripts behind the studies that docs/more.md links to, on tiny inputs."""

import adapter_types
import choose_adapters
import fscil
import pytest
import rejection
import torch
from common import evaluate_network
from more_tables import adapter_types as types_table
from more_tables import choose_adapters as choice_table
from more_tables import fscil as fscil_table
from more_tables import rejection as rejection_table
from more_tables import small_files as sizes_table
from small_files import relative_error

from lora_recycle.distillation.config import DistillationConfig
from lora_recycle.distillation.trainer import MetaLoRATrainer
from lora_recycle.evaluation.incremental import draw_sessions, session_accuracies
from lora_recycle.evaluation.rejection import OpenTask
from lora_recycle.fewshot.episodes import sample_episodes
from lora_recycle.fewshot.heads import make_head


GAINS = {"a/validation 1": [1.0, 0.1], "a/validation 5": [2.0, 0.2]}


def test_a_bandit_finds_the_arm_that_pays():
    for kind in (choose_adapters.Exp3, choose_adapters.Ucb1):
        generator = torch.Generator().manual_seed(0)
        bandit = kind(4, generator)
        picks = []
        for _ in range(300):
            picks.append(bandit.choose())
            bandit.learn(picks[-1], 0.9 if picks[-1] == 2 else 0.1)
        assert set(picks[:60]) == {0, 1, 2, 3} and picks[150:].count(2) > 75
    even = choose_adapters.Even(4, torch.Generator().manual_seed(0))
    assert sorted(even.choose() for _ in range(8)) == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("way", choose_adapters.WAYS)
def test_a_student_learns_from_the_target_and_what_was_chosen(way, tiny_pool, tiny_surrogate, toy_data):
    student = MetaLoRATrainer(tiny_pool, None, DistillationConfig(steps=0, rank=4)).student
    before = [p.detach().clone() for p in student.trainable()]
    shown = torch.stack([toy_data.pixels[toy_data.labels == label][: choose_adapters.SHOTS] for label in range(5)])
    picks = choose_adapters.learn(student, choose_adapters.WAYS[way], tiny_surrogate, shown, 2)
    assert len(picks) == (0 if way == "target alone" else 2)
    assert any(not torch.equal(p, was) for p, was in zip(student.trainable(), before, strict=True))
    row = {"way": way, "gain": {"1": [0.5, 0.1], "5": [0.2, 0.1]}, "own_share": None}
    assert f"| {way} | +0.50 ± 0.10 | +0.20 ± 0.10 |  |" in choice_table({"rows": [row]})


def test_a_variant_is_learned_saved_loaded_and_judged(tiny_pool, tiny_surrogate, toy_data, tmp_path):
    episodes = {("toy", k): sample_episodes(toy_data.labels, 5, k, 5, 10, seed=1) for k in (1, 5)}
    frozen = evaluate_network(tiny_pool.backbone, [toy_data], episodes)
    settings = {"steps": 1, "rank": 4, "relational_batch": 16, "peft_type": "IA3", "init": "zero"}
    row = adapter_types.try_variant(
        tiny_pool, tiny_surrogate, settings, tmp_path / "IA3", [toy_data], episodes, frozen
    )
    assert row["learned"] == row["stored"] == 2 * (5 * 32 + 64) and row["seconds_a_step"] > 0
    assert "| IA3 |" in types_table({"rows": [{"variant": "IA3", **row}]})


def test_sessions_and_their_table(toy_data):
    members = [range(64), range(64, 80), range(80, 100)]
    classes = fscil.classes_of(members, 3)
    assert [len(session) for session in classes] == [60] + [5] * 8
    assert set(sum(classes, [])) == set(range(100)) and max(classes[0]) < 64 <= min(sum(classes[1:8], []))
    sessions = draw_sessions(toy_data.labels, [[0, 1, 2, 3], [4, 5], [6, 7]], shots=2, queries=5)
    found = session_accuracies(toy_data.pixels.float().mean((2, 3)), sessions, make_head("cosine_prototypes", {}))
    row = {"method": "frozen", "head": "lda", "base_images": 5, **fscil.summary([found, found])}
    assert row["drop"] == pytest.approx((found["all"][0] - found["all"][2]).item(), abs=0.01)
    assert row["drop_ci95"] == 0 and "| frozen | lda | 5 |" in fscil_table({"rows": [row]})


def test_strangers_and_their_table():
    tasks = [OpenTask(torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.3, 0.4]]), torch.tensor([0, 1]))] * 2
    judged = rejection.judge(tasks, {"default": 0.1, "surrogate": 0.1, "validation": 10.0})
    assert judged["auroc"]["max_cosine"] == [100, 0] and judged["accuracy"] == 100
    assert judged["ece"]["default"] < 1 < judged["ece"]["validation"]
    table = rejection_table({"rows": [{"data": "a", "shots": 1, "method": "frozen", **judged}]})
    assert "| a | 1 | frozen | 100.0 ± 0.0 |" in table


def test_sizes_and_their_table():
    whole = {"a": torch.tensor([[3.0, 4.0]])}
    assert relative_error({"a": torch.tensor([[3.0, 3.0]])}, whole) == 0.2
    rows = [{"bits": b, "bytes": 1000 * b, "relative_error": 0.2, "gain_over_frozen": GAINS} for b in (1, 32)]
    lines = sizes_table({"rows": rows}).splitlines()
    assert lines[2] == "| 32 | 32 kB | 1.0x | 0.2 | +1.0 ± 0.1 / +2.0 ± 0.2 | +1.50 |" and "| 32.0x |" in lines[3]
