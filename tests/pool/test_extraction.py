"""What was tuned in a checkpoint as a plain LoRA: PEFT's own model with it answers as the checkpoint, to its rank."""

import json
from pathlib import Path

import pytest
import torch
from helpers_adapters import SIZES
from helpers_tiny import tiny_backbone, tiny_vit, toy_images, uniform
from peft import LoHaConfig, PeftModel
from transformers import ViTConfig, ViTForImageClassification

from lora_recycle import AdapterPool, extract, pull_adapter
from lora_recycle.cli.main import main
from lora_recycle.errors import AdapterError, ConfigError, DataError, StorageError


LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint of the tiny backbone: its linear layers moved by rank 3, and its head knows the toy images."""
    return save_checkpoint(tmp_path / "food")


@torch.no_grad()
def save_checkpoint(folder: Path, norms: float = 0.0) -> Path:
    data, generator = toy_images(), torch.Generator().manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**SIZES, id2label=dict(enumerate(data.label_names)))).eval()
    model.vit.load_state_dict(tiny_vit().state_dict())
    for name, parameter in model.vit.named_parameters():
        if name.endswith(tuple(f"{layer}.weight" for layer in LAYERS)):
            out, width = parameter.shape
            b, a = uniform((out, 3), 0.2, generator), uniform((3, width), 0.4, generator)
            parameter += b @ a
        elif norms and "norm" in name:
            parameter += uniform(parameter.shape, norms, generator)
    features = model.vit(tiny_backbone().normalize(data.pixels)).last_hidden_state[:, 0]
    means = torch.stack([features[data.labels == c].mean(0) for c in range(8)])
    model.classifier.weight.copy_(20 * means)
    model.classifier.bias.copy_(-10 * means.square().sum(1))
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(folder, base, pixel_values, names):
    model = ViTForImageClassification.from_pretrained(base, num_labels=len(names))
    return PeftModel.from_pretrained(model, folder).eval()(pixel_values=pixel_values).logits


def test_peft_loads_the_adapter_and_answers_as_the_checkpoint(tiny_backbone_path, checkpoint, toy_data, tmp_path):
    result = extract(checkpoint, tmp_path / "lora", rank=3, base_model=tiny_backbone_path, data=toy_data)
    assert (result.rank, result.left_out) == (3, 0) and result.energy > 0.9999
    assert result.accuracy[0] == result.accuracy[1] > 90
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected = ViTForImageClassification.from_pretrained(checkpoint)(pixel_values=images).logits
    got = logits(tmp_path / "lora", tiny_backbone_path, images, toy_data.label_names)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    info = pull_adapter(tmp_path / "lora")
    assert (info.peft_type, info.rank, list(info.labels)) == ("LORA", 3, toy_data.label_names)
    assert (
        info.base_model == str(tiny_backbone_path) and "checkpoint `food`" in (tmp_path / "lora/README.md").read_text()
    )


def test_the_energy_chooses_the_rank_and_what_no_lora_holds_is_said(tiny_backbone_path, tmp_path):
    checkpoint = save_checkpoint(tmp_path / "food", norms=0.5)
    pool = AdapterPool.from_pretrained(checkpoint, tiny_backbone_path)
    deltas = [b @ a for b, a in pool[0].factors.values()]
    squares = torch.stack([torch.linalg.svdvals(delta)[:32].square() for delta in deltas]).sum(0)
    one = extract(checkpoint, tmp_path / "one", rank=1, base_model=tiny_backbone_path)
    assert one.energy == pytest.approx((squares[0] / squares.sum()).item(), rel=1e-3)
    rest = sum(change.square().sum() for change in pool[0].vector_deltas.values())
    assert one.left_out == pytest.approx((rest / (rest + squares.sum())).item(), rel=1e-3) and one.left_out > 0.05
    two = extract(checkpoint, tmp_path / "two", energy=one.energy + 0.01, base_model=tiny_backbone_path)
    assert two.rank == 2 and two.energy > one.energy
    assert extract(checkpoint, tmp_path / "all", energy=1.0, base_model=tiny_backbone_path).rank == 3
    wide = extract(checkpoint, tmp_path / "wide", rank=500, base_model=tiny_backbone_path)
    assert wide.rank == 32  # of the narrowest side


def test_an_adapter_of_another_type_becomes_a_lora(tiny_pool_path, tmp_path):
    loha = tiny_pool_path / "adapter-3"
    assert json.loads((loha / "adapter_config.json").read_text())["peft_type"] == LoHaConfig().peft_type.value
    result = extract(loha, tmp_path / "lora", rank=16)
    assert result.energy > 0.9999 and pull_adapter(tmp_path / "lora").peft_type == "LORA"


def test_bad_input_is_refused_first(tiny_backbone_path, tiny_pool_path, checkpoint, tmp_path):
    base, output = {"base_model": tiny_backbone_path}, tmp_path / "lora"
    for options, error, message in (
        ({"rank": 0}, ConfigError, "rank must be at least 1, got 0"),
        ({"energy": 1.5}, ConfigError, r"energy must be in \(0, 1\], got 1.5"),
        ({"data": toy_images(classes=9)}, DataError, "toy: shows the classes n0, n1, n2, ..., and food knows n0"),
    ):
        with pytest.raises(error, match=message):
            extract(checkpoint, output, **options, **base)
    with pytest.raises(AdapterError, match="holds 4 adapters"):
        extract(tiny_pool_path, output)
    assert not output.exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(StorageError, match="notes.txt"):
        extract(checkpoint, tmp_path / "full", **base)


def test_the_verb(tiny_backbone_path, checkpoint, tmp_path, capsys):
    output, given = str(tmp_path / "lora"), ["--base-model", str(tiny_backbone_path), "--energy", "0.4"]
    assert main(["extract", str(checkpoint), *given, "--output", output]) == 0
    out = capsys.readouterr()
    assert out.out.startswith(f"{output}: rank 1 holds ") and f"lora-recycle inspect {output}" in out.err
    assert main(["extract", str(checkpoint), "--output", str(tmp_path / "none")]) == 1
    assert "--base-model" in capsys.readouterr().err
