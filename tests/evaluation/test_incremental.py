"""Sessions of new classes: what they hold, and that they are what `add_classes` does."""

import pytest
import torch

from lora_recycle.distillation.config import DistillationConfig
from lora_recycle.distillation.trainer import MetaLoRATrainer
from lora_recycle.errors import ConfigError, DataError
from lora_recycle.evaluation.incremental import draw_sessions, session_accuracies
from lora_recycle.fewshot.heads import make_head


LABELS = torch.arange(6).repeat_interleave(10)
CLASSES = [[5, 0], [3, 1], [2]]


def test_what_the_sessions_hold():
    sessions = draw_sessions(LABELS, CLASSES, shots=2, queries=4, seed=3)
    assert [len(part) for part in sessions.support] == [12, 4, 2]
    assert [len(part) for part in sessions.query] == [8, 8, 4]
    order = [label for session in CLASSES for label in session]
    for images, numbers in ((sessions.support, sessions.support_labels), (sessions.query, sessions.query_labels)):
        assert LABELS[torch.cat(images)].tolist() == [order[i] for i in torch.cat(numbers).tolist()]
    used = torch.cat(sessions.support + sessions.query)
    assert len(used.unique()) == len(used)
    again = draw_sessions(LABELS, CLASSES, shots=2, queries=4, seed=3)
    assert all(torch.equal(one, other) for one, other in zip(sessions.support, again.support, strict=True))
    assert [len(part) for part in draw_sessions(LABELS, CLASSES, shots=2, queries=4, base_shots=3).support] == [
        6,
        4,
        2,
    ]


def test_bad_sessions_are_told():
    with pytest.raises(ConfigError, match="1 classes are in more than one session"):
        draw_sessions(LABELS, [[0, 1], [1]], shots=1, queries=1)
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        draw_sessions(LABELS, [[0, 1]], shots=0, queries=1)
    with pytest.raises(DataError, match="class 3 has 10 images, 8 \\+ 5 are needed"):
        draw_sessions(LABELS, CLASSES, shots=5, queries=8)


def test_accuracies_by_hand():
    """The new class lies where class 0 does, and the earlier one wins."""
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    sessions = draw_sessions(labels, [[0, 1], [2]], shots=1, queries=1)
    found = session_accuracies(features, sessions, make_head("cosine_prototypes", {}))
    assert found["all"].tolist() == pytest.approx([100, 200 / 3])
    assert found["base"].tolist() == [100, 100]
    assert found["new"][0].isnan() and found["new"][1] == 0


@pytest.mark.parametrize("head", ["prototypes", "lda"])
def test_sessions_are_what_add_classes_does(head, tiny_pool, toy_data):
    student = MetaLoRATrainer(tiny_pool, None, DistillationConfig(steps=0, rank=4)).train(progress=False)
    model = student.to_model({"head": head})
    order = [[6, 2, 3], [7, 0], [1, 5]]
    sessions = draw_sessions(toy_data.labels, order, shots=2, queries=5, base_shots=4)
    found = session_accuracies(model.embed(toy_data.pixels).clone(), sessions, model.head)
    for i in range(3):
        images, numbers = toy_data.pixels[sessions.support[i]], sessions.support_labels[i]
        (model.add_classes if i else model.fit)(images, numbers.tolist())
        asked, truth = torch.cat(sessions.query[: i + 1]), torch.cat(sessions.query_labels[: i + 1])
        right = torch.tensor(model.predict(toy_data.pixels[asked])) == truth
        assert found["all"][i].item() == pytest.approx(100 * right.float().mean().item(), abs=0.01)
