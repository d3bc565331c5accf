"""Every stage on what the package ships: the real backbone, real adapters, the real meta-LoRA."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

from lora_recycle import (
    AdapterPool,
    DistillationConfig,
    InversionConfig,
    LoRAInverter,
    MetaLoRAForFewShotClassification,
    MetaLoRATrainer,
)
from lora_recycle.adapters.places import find_adapters
from lora_recycle.adapters.pull import pull_adapter
from lora_recycle.demo import backbone_path, meta_lora_path, pool_path
from lora_recycle.demo.run import load_digits_images
from lora_recycle.evaluation.config import EvaluationConfig
from lora_recycle.evaluation.evaluate import evaluate
from lora_recycle.hub.embedded import ASSETS, BACKBONE_NAME


@pytest.fixture(scope="module")
def pool():
    """One adapter of each data set, and one written under transformers 4."""
    names = ("cifar_fs-05", "mini_imagenet-02", "vgg_flower-05", "omniglot_small-05")
    return AdapterPool.from_pretrained([pool_path() / name for name in names])


@pytest.fixture(scope="module")
def digits():
    return load_digits_images(64, max_per_class=20)


def test_the_embedded_default_is_small_and_mixed():
    assert sum(p.stat().st_size for p in ASSETS.rglob("*") if p.is_file()) < 35 * 2**20
    infos = [pull_adapter(path) for path in find_adapters(pool_path())]
    assert len(infos) >= 40
    assert {info.base_model for info in infos} == {BACKBONE_NAME}
    assert sum(info.generation == 4 for info in infos) >= 4
    assert {info.peft_type for info in infos} == {"LORA", "LOHA"}
    assert any(info.config.get("use_dora") for info in infos)
    assert {2, 4, 8, 16} <= {info.rank for info in infos}
    assert min(info.num_classes for info in infos) == 3 and max(info.num_classes for info in infos) == 64
    assert all(len(info.labels) == info.num_classes for info in infos)
    assert not list(ASSETS.rglob("*.bin"))


def test_an_embedded_adapter_gives_the_logits_that_peft_gives(pool, digits):
    path = pool_path() / "cifar_fs-05"
    model = AutoModelForImageClassification.from_pretrained(backbone_path(), num_labels=10)
    theirs = PeftModel.from_pretrained(model, path).eval()
    pixel_values = pool.backbone.normalize(digits.pixels[:4])
    with torch.no_grad(), pool.folded(0) as network:
        ours = pool[0].logits(network, network(pixel_values)[0])
        torch.testing.assert_close(ours, theirs(pixel_values).logits, atol=2e-4, rtol=1e-4)


def test_normalisation_is_the_image_processors(pool, digits):
    processor = AutoImageProcessor.from_pretrained(backbone_path(), backend="pil")
    expected = processor(images=[digits.pixels[0].permute(1, 2, 0).numpy()], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pool.backbone.normalize(digits.pixels[:1]), expected, atol=1e-6, rtol=0)


def test_inversion_reaches_the_classes_and_distillation_learns(pool, tmp_path):
    pool = pool.subset([0, 3])
    config = InversionConfig(images_per_class=2, max_classes=5, iterations=15)
    surrogate = LoRAInverter(pool, config).run(tmp_path / "surrogate", progress=False)
    assert all(entry["accuracy"] >= 0.7 for entry in surrogate.manifest["shards"])
    trainer = MetaLoRATrainer(pool, surrogate, DistillationConfig(steps=8, rank=8, relational_batch=20, groups="one"))
    trainer.train(tmp_path / "work", progress=False)
    relational = trainer.history["relational"]
    assert sum(relational[-2:]) < sum(relational[:2])


def test_the_embedded_meta_lora_is_a_plain_peft_adapter(digits):
    model = MetaLoRAForFewShotClassification.from_pretrained("demo")
    plain = PeftModel.from_pretrained(
        AutoModel.from_pretrained(backbone_path(), add_pooling_layer=False), meta_lora_path()
    )
    pixel_values = model.backbone.normalize(digits.pixels[:4])
    with torch.no_grad():
        expected = plain.eval()(pixel_values=pixel_values).last_hidden_state[:, 0]
        torch.testing.assert_close(model.features(pixel_values), expected, atol=1e-5, rtol=1e-5)
    assert not (meta_lora_path() / "config.json").exists()
    sources = json.loads((meta_lora_path() / "meta_lora_config.json").read_text())["sources"]
    shipped = {pull_adapter(path).sha256 for path in find_adapters(pool_path())}
    assert {source["sha256"] for source in sources} == shipped


def test_the_embedded_meta_lora_beats_the_frozen_backbone_on_digits(digits):
    model = MetaLoRAForFewShotClassification.from_pretrained("demo")
    rows = evaluate(digits, model, EvaluationConfig(episodes=200)).rows
    for row in rows:
        if row["method"] == "meta-lora":
            assert row["delta_vs_frozen"] > row["delta_ci95"]


def test_fit_and_predict_agree_on_digits(digits):
    model = MetaLoRAForFewShotClassification.from_pretrained("demo")
    support = torch.cat([index[:5] for index in digits.by_class().values()])
    model.fit(digits.pixels[support], [digits.label_names[i] for i in digits.labels[support]])
    probabilities = model.predict_proba(digits.pixels[:10])
    names = model.predict(digits.pixels[:10])
    assert names == [model.label_names[i] for i in probabilities.argmax(1)]
    torch.testing.assert_close(probabilities.sum(1), torch.ones(10))
    own = [digits.label_names[i] for i in digits.labels[support]]
    right = sum(a == b for a, b in zip(model.predict(digits.pixels[support]), own, strict=True))
    assert right > 30  # of the 50 that it learned from; chance is 5
