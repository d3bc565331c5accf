"""Steps that are left out, and runs that look no further: NaN, spikes, accumulation, clipping."""

import json

import pytest
import torch
from helpers_tiny import same_weights

from lora_recycle.distillation.config import DistillationConfig
from lora_recycle.distillation.parallel import gather_features, own_rows
from lora_recycle.distillation.spikes import SpikeGuard, longest_tail
from lora_recycle.distillation.trainer import MetaLoRATrainer
from lora_recycle.errors import ConfigError, DataError


def recipe(**changes):
    return DistillationConfig(**{"steps": 16, "rank": 4, "relational_batch": 16, "groups": "one", **changes})


def weights(trainer):
    return [p.detach().clone() for p in trainer.student.trainable()]


class Disturbed(MetaLoRATrainer):
    """Its losses are multiplied by `factors[step]`."""

    factors: dict[int, float] = {}

    def _losses(self, batch):
        factor = self.factors.get(len(self.seen), 1.0)
        self.seen.append(factor)
        return {name: value * factor for name, value in super()._losses(batch).items()}

    def prepare(self, *args, **options):
        self.seen = []
        return super().prepare(*args, **options)


def disturbed(pool, surrogate, config, factors):
    trainer = Disturbed(pool, surrogate, config)
    trainer.factors = factors
    return trainer


def test_what_is_not_finite_or_far_above_the_median_is_a_spike():
    guard = SpikeGuard(10.0)
    assert not any(guard(torch.tensor(value)) for value in [1.0, 100.0, *[1.0] * 9])  # too few to tell, then a median
    assert [bool(guard(torch.tensor(value))) for value in (9.9, 10.1, torch.nan, torch.inf, 2.0)] == [
        False,
        True,
        True,
        True,
        False,
    ]
    lenient = SpikeGuard(0.0)
    assert [bool(lenient(torch.tensor(v))) for v in [*[1.0] * 20, 1e9, torch.nan]] == [*[False] * 21, True]


def test_a_guard_that_replays_judges_as_the_one_that_saw():
    losses = [torch.tensor(float(1 + i % 3 + (80 if i in (30, 77) else 0))) for i in range(120)]
    seen, replayed = SpikeGuard(10.0), SpikeGuard(10.0)
    spikes = [i for i, loss in enumerate(losses) if seen(loss)]
    assert replayed.replay(losses) == spikes == [30, 77]
    assert seen.seen == replayed.seen and torch.equal(seen._recent.isnan(), replayed._recent.isnan())
    assert torch.equal(seen._recent.nan_to_num(), replayed._recent.nan_to_num())


def test_steps_in_a_row():
    assert [longest_tail([3, 5, 6, 7], step) for step in (7, 8)] == [3, 0] and longest_tail([], 0) == 0


@pytest.mark.parametrize("factor", [50.0, float("nan")])
def test_a_spike_moves_nothing_and_is_counted(tiny_pool, tiny_surrogate, factor):
    trainer = disturbed(tiny_pool, tiny_surrogate, recipe(), {12: factor})
    trainer.prepare(progress=False)
    for step in range(12):
        trainer.step(step)
    before, state = weights(trainer), trainer.optimizer.state[trainer.student.trainable()[0]]
    moments, count = state["exp_avg"].clone(), state["step"].clone()
    trainer.step(12)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(trainer), strict=True))
    assert torch.equal(state["exp_avg"], moments) and torch.equal(state["step"], count)
    trainer.step(13)
    assert not torch.equal(before[0], weights(trainer)[0])
    trainer.close()
    assert trainer.skipped == [12] and len(trainer.history["relational"]) == 14


def test_a_gradient_that_is_not_finite_moves_nothing(tiny_pool, tiny_surrogate):
    trainer = MetaLoRATrainer(tiny_pool, tiny_surrogate, recipe(max_grad_norm=1.0))
    trainer.prepare(progress=False)
    before = weights(trainer)
    handle = trainer.student.trainable()[-1].register_hook(lambda grad: grad * torch.inf)
    trainer.step(0)
    handle.remove()
    trainer.close()
    assert all(torch.equal(a, b) for a, b in zip(before, weights(trainer), strict=True)) and trainer.skipped == [0]


def test_five_spikes_in_a_row_stop_and_the_last_good_checkpoint_stays(tiny_pool, tiny_surrogate, tmp_path):
    config = recipe(save_steps=6, steps=20)
    trainer = disturbed(tiny_pool, tiny_surrogate, config, dict.fromkeys(range(11, 20), float("nan")))
    with pytest.raises(DataError, match=r"The loss is nan at step 15: lower `lr` .* The last 5 steps were left out"):
        trainer.train(tmp_path, progress=False)
    log = json.loads((tmp_path / "training_log.json").read_text())
    assert len(log["relational"]) == 6  # the checkpoint due after step 11, itself a spike, was not written


def test_accumulated_batches_step_once_by_their_mean(tiny_pool, tiny_surrogate):
    once = MetaLoRATrainer(tiny_pool, tiny_surrogate, recipe(steps=2))
    twice = MetaLoRATrainer(tiny_pool, tiny_surrogate, recipe(steps=1, gradient_accumulation_steps=2))
    for trainer in (once, twice):
        trainer.prepare(progress=False)
    expected = [once._losses(once.make_batch(number))["relational"] for number in range(2)]
    gradients = torch.autograd.grad(sum(expected) / 2, once.student.trainable())
    loss = twice.step(0)["relational"]
    torch.testing.assert_close(loss, sum(expected).detach() / 2)
    for parameter, gradient in zip(twice.student.trainable(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-7)
    assert len(twice._unread) == 1
    for trainer in (once, twice):
        trainer.close()


def test_gradients_are_clipped_to_the_norm(tiny_pool, tiny_surrogate):
    norms = {}
    for limit in (0.0, 1e-3):
        trainer = MetaLoRATrainer(tiny_pool, tiny_surrogate, recipe(steps=1, max_grad_norm=limit))
        trainer.prepare(progress=False)
        trainer.step(0)
        after = torch.nn.utils.get_total_norm([p.grad for p in trainer.student.trainable()]).item()
        norms[limit] = (trainer._unread[0][2]["grad_norm"].item(), after)
        trainer.close()
    assert norms[0.0][0] == norms[1e-3][0] == norms[0.0][1] > 1e-3
    assert norms[1e-3][1] == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize(("count", "processes"), [(7, 1), (7, 2), (8, 4), (5, 4)])
def test_shares_cover_all_images_once(count, processes):
    shares = [own_rows(count, process, processes) for process in range(processes)]
    assert len({len(share) for share in shares}) == 1
    assert torch.cat(shares)[:count].tolist() == list(range(count))


@pytest.mark.parametrize("process", [0, 1, 2])
def test_gathered_features_are_those_of_all_and_carry_only_their_own_gradient(process):
    features, shares = torch.randn(7, 4), [own_rows(7, i, 3) for i in range(3)]

    class Three:
        num_processes, process_index = 3, process

        @staticmethod
        def gather(own):
            return features[torch.cat(shares)]

    own = features[shares[process]].requires_grad_()
    gathered = gather_features(own, 7, Three)
    assert torch.equal(gathered, features)
    gathered.square().sum().backward()
    valid = torch.arange(3) + 3 * process < 7
    torch.testing.assert_close(own.grad, 2 * own.detach() * valid[:, None])


def test_adapters_below_the_confidence_are_left_out(tiny_pool, tiny_surrogate):
    scores = [entry["confidence"] for entry in tiny_surrogate.manifest["shards"]]
    threshold = (sorted(scores)[0] + sorted(scores)[1]) / 2
    trainer = MetaLoRATrainer(tiny_pool, tiny_surrogate, recipe(steps=1, min_confidence=threshold))
    ((name, reason),) = trainer.excluded
    left = scores.index(min(scores))
    assert name == tiny_pool.infos[left].where and f"confidence of {scores[left]:.2f} only, below" in reason
    assert [i.name for i in trainer.pool.infos] == [f"adapter-{i}" for i in range(4) if i != left]
    alone = MetaLoRATrainer(tiny_pool.subset([i for i in range(4) if i != left]), tiny_surrogate, recipe(steps=1))
    assert same_weights(trainer.student, alone.student.state_dict())  # not in the average either
    with pytest.raises(DataError, match="none of the 4 adapters is fit to be learnt from"):
        MetaLoRATrainer(tiny_pool, tiny_surrogate, recipe(min_confidence=0.99))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"spike_factor": 0.5}, "spike_factor must be 0 or greater than 1, got 0.5"),
        ({"min_confidence": 1.0}, r"min_confidence must be in \[0, 1\), got 1.0"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must not be negative, got -1.0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1, got 0"),
    ],
)
def test_settings_out_of_range(changes, told):
    with pytest.raises(ConfigError, match=told):
        recipe(**changes)
