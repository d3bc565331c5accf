"""The paper's recipe: its values are those that the documentation lists, and a copy of it, cut down, runs."""

import re
from pathlib import Path

import pytest
import torch
import yaml

from lora_recycle import AdapterPool, LoRAInverter, MetaLoRAForFewShotClassification, MetaLoRATrainer, evaluate
from lora_recycle.distillation.config import DistillationConfig
from lora_recycle.evaluation.config import EvaluationConfig
from lora_recycle.hub.embedded import pool_path
from lora_recycle.images.labelled import LabelledImages
from lora_recycle.inversion.config import InversionConfig
from lora_recycle.pool.config import AdapterTrainingConfig


ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "examples" / "recipes" / "paper-clip-vit-b16.yaml"
PAGE = ROOT / "docs" / "studies" / "paper.md"
CONFIGS = {
    "train-adapters": AdapterTrainingConfig,
    "invert": InversionConfig,
    "distill": DistillationConfig,
    "evaluate": EvaluationConfig,
}


@pytest.fixture(scope="module")
def configs():
    sections = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    assert set(sections) == set(CONFIGS)
    return {name: CONFIGS[name].from_dict(values, str(RECIPE)) for name, values in sections.items()}


def test_its_values_are_those_of_the_table(configs):
    rows = re.findall(r"^\| `([\w-]+)\.(\w+)` \| (.*?) \| (.+) \|$", PAGE.read_text(encoding="utf-8"), re.M)
    assert len(rows) > 30 and all(difference for *_, difference in rows)
    for section, key, value, _ in rows:
        there = getattr(configs[section], key)
        shown = str(there).replace("'", "") if isinstance(there, dict) else str(there)
        assert shown == value, f"{section}.{key}"


def test_what_the_recipe_changes_is_in_the_table(configs):
    """All but what sizes the work or follows from another row."""
    free = {"batch_size", "max_classes", "save_steps", "spike_factor"}
    listed = set(re.findall(r"^\| `[\w-]+\.(\w+)` \|", PAGE.read_text(encoding="utf-8"), re.M))
    sections = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    assert {key for values in sections.values() for key in values} - free <= listed


def test_the_papers_numbers(configs):
    """As the paper states them, whatever the recipe and the table say."""
    invert, distill, judged = configs["invert"], configs["distill"], configs["evaluate"]
    assert (invert.iterations, invert.lr, invert.parameterization, invert.flip) == (2000, 0.25, "pixels", True)
    assert set(invert.priors) == {"batch_norm"} and invert.jitter == 224 // 8
    assert (distill.rank, distill.targets, distill.init) == (4, "q_proj,v_proj", "zero")
    assert (distill.metric, distill.temperature, distill.schedule, distill.lr) == ("euclidean", 1.0, "cyclic", 1e-3)
    assert (distill.kl_weight, distill.interpolation_weight, distill.relational_weight) == (1.0, 1.0, 0.0)
    assert (judged.episodes, judged.shots, judged.ways) == (600, (1, 5), 5)


def cut(config, **changes):
    return type(config)(**{**config.to_dict(), **changes})


def test_a_copy_of_a_few_steps_runs_on_the_shipped_pool(configs, tmp_path):
    """The prior's CNN is the one that the tests install; everything else is the recipe's, on less of everything."""
    pool = AdapterPool.from_pretrained([pool_path() / name for name in ("vgg_flower-00", "vgg_flower-01")])
    small = {"images_per_class": 2, "max_classes": 3, "iterations": 3, "prune_start": 1, "jitter": 8}
    invert = cut(configs["invert"], **small, prune={3: 0.5}, keep_ratio=0.5)
    surrogate = LoRAInverter(pool, invert).run(tmp_path / "surrogate", progress=False)
    distill = cut(configs["distill"], steps=3, ways=3, queries=1)
    trainer = MetaLoRATrainer(pool, surrogate, distill)
    trainer.train(progress=False)
    assert set(trainer.history) == {"kl", "interpolation"} and len(trainer.history["kl"]) == 3
    trainer.to_model().save_pretrained(tmp_path / "meta")
    model = MetaLoRAForFewShotClassification.from_pretrained(tmp_path / "meta")
    changed = dict(model.peft_model.named_parameters())
    adapted = {name.split(".lora_")[0].rpartition(".")[2] for name in changed if "lora_B" in name}
    assert adapted == {"q_proj", "v_proj"}
    assert all(p.shape[1] == 4 and p.abs().sum() > 0 for name, p in changed.items() if "lora_B" in name)
    images = torch.randint(0, 256, (15, 3, 64, 64), dtype=torch.uint8)
    data = LabelledImages(images, torch.arange(3).repeat_interleave(5), ["a", "b", "c"], "noise")
    rows = evaluate(data, model, cut(configs["evaluate"], ways=3, shots=(1,), queries=2, episodes=4)).rows
    assert {row["method"] for row in rows} >= {"frozen", "meta-lora"}
