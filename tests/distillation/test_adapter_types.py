"""Meta-adapters of every type and start: where they begin, that they learn, and that PEFT loads them as they were."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModel

from lora_recycle.distillation.config import PEFT_TYPES, PRINCIPAL_STARTS, STARTS_FROM_AVERAGE, DistillationConfig
from lora_recycle.distillation.saving import save_meta_lora
from lora_recycle.distillation.trainer import MetaLoRATrainer
from lora_recycle.errors import ConfigError
from lora_recycle.modeling.meta_lora import MetaLoRAForFewShotClassification


PIXELS = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
WAYS = [{"peft_type": kind, "init": "zero"} for kind in PEFT_TYPES] + [{"init": method} for method in PRINCIPAL_STARTS]


def trainer_of(tiny_pool, surrogate, **settings):
    config = DistillationConfig(
        **{"steps": 2, "rank": 4, "relational_batch": 16, "lr": 1e-2, "validation_fraction": 0.0, **settings}
    )
    return MetaLoRATrainer(tiny_pool, surrogate, config)


@pytest.mark.parametrize("settings", WAYS, ids=lambda way: "-".join(way.values()))
def test_it_starts_at_nothing_learns_and_is_a_plain_adapter(
    settings, tiny_pool, tiny_surrogate, tiny_backbone_path, tmp_path
):
    trainer = trainer_of(tiny_pool, tiny_surrogate, **settings)
    bare = {name: p.clone() for name, p in tiny_pool.backbone.model.named_parameters()}
    with torch.no_grad():
        frozen = tiny_pool.backbone.features(PIXELS)
        torch.testing.assert_close(trainer.student(PIXELS), frozen, rtol=1e-4, atol=1e-4)
    student = trainer.train(progress=False)
    with torch.no_grad():
        learned = student(PIXELS)
    assert (learned - frozen).abs().max() > 1e-3
    assert all(torch.equal(p, bare[name]) for name, p in tiny_pool.backbone.model.named_parameters())
    save_meta_lora(trainer.to_model(), tmp_path / "meta")
    loaded = MetaLoRAForFewShotClassification.from_pretrained(tmp_path / "meta")
    base = AutoModel.from_pretrained(tiny_backbone_path, add_pooling_layer=False)
    worn = PeftModel.from_pretrained(base, tmp_path / "meta").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded.features(PIXELS), learned, rtol=1e-4, atol=1e-5)
        plain = worn(pixel_values=PIXELS).last_hidden_state[:, 0]
        torch.testing.assert_close(plain, learned, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_dora_from_the_average_is_the_average(tiny_pool):
    lora, dora = (trainer_of(tiny_pool, None, steps=0, peft_type=kind).student for kind in ("LORA", "DORA"))
    torch.testing.assert_close(dora(PIXELS), lora(PIXELS), rtol=1e-4, atol=1e-4)
    assert (lora(PIXELS) - tiny_pool.backbone.features(PIXELS)).abs().max() > 1e-2


@torch.no_grad()
def test_a_shira_from_the_average_holds_its_largest_entries(tiny_pool):
    student = trainer_of(tiny_pool, None, steps=0, peft_type="SHIRA", init="average").student
    layer = student.backbone.model.get_submodule("layers.0.mlp.fc1")
    b, a = tiny_pool.average()["layers.0.mlp.fc1"]
    delta, rows = b @ a, layer.shira_indices["default"].long()
    assert rows.shape == (2, 4 * (32 + 64))
    torch.testing.assert_close(layer.shira_weight["default"], delta[rows[0], rows[1]])
    left = delta.clone()
    left[rows[0], rows[1]] = 0
    assert layer.shira_weight["default"].abs().min() >= left.abs().max()


def test_half_of_a_pissa_stays_what_it_takes_out_of_the_weights(tiny_pool, tiny_surrogate):
    trainer = trainer_of(tiny_pool, tiny_surrogate, init="pissa")
    layer = trainer.student.backbone.model.get_submodule("layers.1.mlp.fc2")
    a, b = (part["default"].weight.detach().clone() for part in (layer.lora_A, layer.lora_B))
    u, s, vh = torch.linalg.svd(layer.base_layer.weight)
    torch.testing.assert_close(-b[:, 4:] @ a[4:], (u[:, :4] * s[:4]) @ vh[:4], rtol=1e-4, atol=1e-5)
    trainer.train(progress=False)
    after = layer.lora_A["default"].weight
    assert torch.equal(after[4:], a[4:]) and torch.equal(layer.lora_B["default"].weight[:, 4:], b[:, 4:])
    assert (after[:4] - a[:4]).abs().max() > 1e-3


def test_what_does_not_go_together_is_refused(tiny_pool):
    for kind in set(PEFT_TYPES) - set(STARTS_FROM_AVERAGE):
        with pytest.raises(ConfigError, match=f"{kind} cannot start from an average"):
            DistillationConfig(peft_type=kind)
    with pytest.raises(ConfigError, match="pissa needs peft_type LORA, got DORA"):
        DistillationConfig(peft_type="DORA", init="pissa")
    with pytest.raises(ConfigError, match="corda"):
        trainer_of(tiny_pool, None, steps=0, init="corda")
