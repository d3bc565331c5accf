"""An adapter whose images go out of hand stops alone."""

import json

import pytest

from lora_recycle.cli.main import main
from lora_recycle.distillation.config import DistillationConfig
from lora_recycle.distillation.trainer import MetaLoRATrainer
from lora_recycle.errors import DivergenceError
from lora_recycle.inversion.batch import InversionBatch
from lora_recycle.inversion.config import InversionConfig
from lora_recycle.inversion.inverter import LoRAInverter
from lora_recycle.surrogate.dataset import SurrogateDataset
from lora_recycle.surrogate.manifest import check_manifest


def quick(**changes):
    return InversionConfig(**{"images_per_class": 3, "iterations": 3, "jitter": 0, **changes})


@pytest.fixture
def diverging(monkeypatch):
    """Names of adapters whose loss is NaN from the second iteration on."""
    names, step = set(), InversionBatch.step

    def disturbed(batch):
        loss = step(batch)
        ill = batch.objective.adapter.info.name in names and batch.iteration > 1
        return loss * float("nan") if ill else loss

    monkeypatch.setattr(InversionBatch, "step", disturbed)
    return names


def test_one_stops_and_the_rest_goes_on(tiny_pool, tmp_path, diverging):
    diverging.add("adapter-1")
    inverter = LoRAInverter(tiny_pool, quick())
    surrogate = inverter.run(tmp_path, progress=False)
    (failed,) = inverter.failed
    assert failed["name"] == "adapter-1" and failed["sha256"] == tiny_pool.infos[1].sha256
    assert (
        "adapter-1: the loss of its images is not finite from iteration 1 on. Lower `lr` (now 0.05)"
        in failed["reason"]
    )
    assert [entry["adapter"]["name"] for entry in surrogate.manifest["shards"]] == [
        "adapter-0",
        "adapter-2",
        "adapter-3",
    ]
    assert SurrogateDataset.from_pretrained(tmp_path).manifest["failed"] == [failed]
    trainer = MetaLoRATrainer(tiny_pool, surrogate, DistillationConfig(steps=1, rank=2, relational_batch=8))
    ((name, reason),) = trainer.excluded
    assert name == tiny_pool.infos[1].where and reason.startswith("its inversion failed: ") and len(trainer.pool) == 3
    diverging.clear()
    again = LoRAInverter(tiny_pool, quick())
    assert again.run(tmp_path, progress=False).num_shards == 4 and again.failed == []


def test_where_all_diverge_the_run_fails(tiny_pool, tmp_path, diverging):
    diverging.update(f"adapter-{i}" for i in range(4))
    with pytest.raises(DivergenceError, match="adapter-0: the loss of its images"):
        LoRAInverter(tiny_pool, quick()).run(tmp_path, progress=False)
    assert not (tmp_path / "manifest.json").exists()


def test_the_command_tells_who_failed_and_whose_images_are_doubtful(tiny_pool_path, tmp_path, diverging, capsys):
    diverging.add("adapter-2")
    command = [
        "invert",
        str(tiny_pool_path),
        "--output",
        str(tmp_path),
        "--iterations",
        "1",
        "--images-per-class",
        "2",
    ]
    assert main([*command, "--iterations", "2", "--starts", "noise=1", "--quiet"]) == 0
    said = capsys.readouterr().err
    assert "1 of 4 adapters skipped:" in said and "adapter-2: the loss of its images is not finite" in said
    scores = {
        e["adapter"]["name"]: e["confidence"] for e in json.loads((tmp_path / "manifest.json").read_text())["shards"]
    }
    doubtful = [f"{name} ({score:.2f})" for name, score in scores.items() if score < 0.5]
    assert (
        doubtful
        and f"{len(doubtful)} adapters give their own images a low probability: {', '.join(doubtful)}." in said
    )


@pytest.mark.parametrize("failed", ["adapter", [1], [{"name": "x", "sha256": "y"}]])
def test_a_strange_list_of_failures_is_refused(tiny_surrogate, failed):
    with pytest.raises(ValueError, match="failed must list adapters"):
        check_manifest(tiny_surrogate.manifest | {"failed": failed})
