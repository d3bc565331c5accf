"""Exported models say what the model says: through onnxruntime, `torch.export.load`, and plain transformers."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_tiny import SIZES, copied_state, shake, tiny_processor
from peft import LilyConfig, LoraConfig, get_peft_model
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModel,
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    DeiTConfig,
    DeiTModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from lora_recycle import AdapterError, Backbone, ConfigError, MetaLoRAForFewShotClassification, export


EXAMPLE = Path(__file__).parents[2] / "examples" / "predict_without_torch.py"
SQUARE = {"height": 32, "width": 32}
CROPPED = {"size": {"shortest_edge": 37}, "crop_size": SQUARE}
#: a random network and its image processor: the three ways in which images reach networks of these families
FAMILIES = {
    "vit": (lambda: ViTModel(ViTConfig(**SIZES), add_pooling_layer=False), tiny_processor),
    "deit": (lambda: DeiTModel(DeiTConfig(**SIZES), add_pooling_layer=False), tiny_processor),
    "dinov2": (lambda: Dinov2Model(Dinov2Config(**SIZES)), lambda: BitImageProcessorPil(**CROPPED)),
    "registers": (
        lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SIZES, num_register_tokens=3)),
        lambda: BitImageProcessorPil(**CROPPED),
    ),
    "clip": (lambda: CLIPVisionModel(CLIPVisionConfig(**SIZES)), lambda: CLIPImageProcessorPil(**CROPPED)),
    "siglip": (
        lambda: SiglipVisionModel(SiglipVisionConfig(**SIZES)),
        lambda: SiglipImageProcessorPil(size=SQUARE),
    ),
}


def build(family="vit", config=None, head="prototypes") -> MetaLoRAForFewShotClassification:
    """A tiny model whose adapter changes much."""
    network, processor = FAMILIES[family]
    torch.manual_seed(0)
    backbone = Backbone(shake(network()), processor(), f"tiny-{family}")
    config = config or LoraConfig(r=4, target_modules=["q_proj", "v_proj", "fc1"])
    peft_model, generator = get_peft_model(backbone.model, config), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return MetaLoRAForFewShotClassification(backbone, peft_model, {"head": head})


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Nine pictures of three colours, none of them square, one that its EXIF turns."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    colours, paths = rng.integers(0, 150, (3, 3)), []
    for i in range(9):
        pixels = colours[i % 3] + rng.integers(0, 105, (40 + 7 * i, 90 - 5 * i, 3))
        exif = Image.Exif()
        exif[0x0112] = 6 if i == 4 else 1  # turned by a quarter
        paths.append(folder / f"{i}.png")
        Image.fromarray(pixels.astype(np.uint8)).save(paths[-1], exif=exif)
    return paths


def fitted(photos, *args, **options) -> MetaLoRAForFewShotClassification:
    return build(*args, **options).fit(photos[:6], ["red", "grün", "blue"] * 2)


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("predict_without_torch", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def inputs(example, described, photos) -> torch.Tensor:
    """Images as the example makes them, by what `export.json` says alone: (N, 3, S, S)."""
    return torch.from_numpy(np.stack([example.pixel_values(path, described["image"]) for path in photos]))


@pytest.mark.parametrize("family", FAMILIES)
def test_probabilities_are_the_models_from_the_files_on(family, photos, example, tmp_path):
    model = fitted(photos, family)
    before, expected = copied_state(model), model.predict_proba(photos)
    described = export(model, tmp_path, "torch")
    assert described == json.loads((tmp_path / "export.json").read_text())
    assert described["label_names"] == model.label_names == ["blue", "grün", "red"]
    assert described["checked"]["batch_sizes"] == [1, 2, 7] and described["checked"]["difference"] <= 1e-4
    after = copied_state(model)
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    assert expected.std(0).min() > 1e-3  # images differ in what the model says of them
    program, pixel_values = torch.export.load(tmp_path / "model.pt2").module(), inputs(example, described, photos)
    for count in (1, 4, 9):
        torch.testing.assert_close(program(pixel_values[:count]), expected[:count], atol=1e-4, rtol=1e-3)


def test_without_a_task_it_gives_embeddings(photos, example, tmp_path):
    model = build("clip")
    described = export(model, tmp_path, "torch")
    assert described["output"] == {"name": "embeddings", "shape": ["batch", 32]} and not described["label_names"]
    program = torch.export.load(tmp_path / "model.pt2").module()
    found = program(inputs(example, described, photos))
    torch.testing.assert_close(found, model.embed(photos), atol=1e-4, rtol=1e-3)


@pytest.mark.slow  # 5 to 15 s each, nearly all of it torch's converter
@pytest.mark.parametrize("task", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_onnx_says_the_same(family, task, photos, example, tmp_path):
    model = fitted(photos, family) if task else build(family)
    expected = model.predict_proba(photos) if task else model.embed(photos)
    described = export(model, tmp_path)
    assert described["checked"]["difference"] <= 1e-4
    assert described["output"]["name"] == ("probabilities" if task else "embeddings")
    for batch_size in (1, 4, 9):
        np.testing.assert_allclose(example.run(tmp_path, photos, batch_size), expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("head", ["euclidean_prototypes", "lda"])
def test_every_head_that_looks_at_one_image_is_exported(head, photos, tmp_path):
    model = fitted(photos, head=head)
    export(model, tmp_path, "torch")
    program = torch.export.load(tmp_path / "model.pt2").module()
    for count in (1, 3, 9):
        pixel_values = model.preprocess(photos[:count])
        torch.testing.assert_close(program(pixel_values), model.predict_proba(photos[:count]), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_transformers_checkpoint_has_the_same_features_by_itself(family, photos, tmp_path):
    model = build(family)
    model.merge_and_save(tmp_path)
    network, found = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values()), found
    images = AutoImageProcessor.from_pretrained(tmp_path)(
        [Image.open(path) for path in photos[:4]], return_tensors="pt"
    )
    with torch.inference_mode():
        features = network(**images).pooler_output
    torch.testing.assert_close(features, model.embed(photos[:4]), rtol=1e-3, atol=1e-4)
    described = json.loads((tmp_path / "export.json").read_text())
    assert described["format"] == "transformers" and described["output"]["name"] == "embeddings"
    # and the library takes it for a backbone
    torch.testing.assert_close(
        Backbone.from_pretrained(tmp_path).features(images["pixel_values"]), features, rtol=1e-3, atol=1e-4
    )


def test_the_example_runs_without_torch_and_this_library(photos, tmp_path):
    model = fitted(photos).merge()  # a merged one exports the same
    export(model, tmp_path)
    blocked = "import runpy, sys; sys.modules.update(dict.fromkeys(('torch', 'transformers', 'lora_recycle')))"
    code = f"{blocked}; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, EXAMPLE, tmp_path, *photos, "--npy", tmp_path / "all.npy"]
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", env={**os.environ, "PYTHONUTF8": "1"}, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    expected = model.predict_proba(photos)
    np.testing.assert_allclose(np.load(tmp_path / "all.npy"), expected, atol=1e-4)
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert [row[:2] for row in rows] == [[str(p), name] for p, name in zip(photos, model.predict(photos), strict=True)]
    np.testing.assert_allclose([float(row[2]) for row in rows], expected.max(1).values, atol=1e-3)


def test_half_precision_models_are_exported_in_float32(photos, tmp_path):
    model = build().to(torch.bfloat16)
    export(model, tmp_path, "torch")
    program = torch.export.load(tmp_path / "model.pt2").module()
    images = model.preprocess(photos)
    found, expected = program(images), model.embed(photos).float()
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_what_answers_otherwise_is_told_and_not_left_behind(monkeypatch, tmp_path):
    module = importlib.import_module("lora_recycle.modeling.export")
    write = module._WRITERS["torch"]

    def off_by_a_little(graph, folder):
        run = write(graph, folder)
        return lambda images: run(images) * (1 + (1e-3 if len(images) > 1 else 0))

    monkeypatch.setitem(module._WRITERS, "torch", off_by_a_little)
    with pytest.raises(AdapterError, match=r"tiny-vit: the exported model answers otherwise, by 1\.0e-03"):
        export(build(), tmp_path, "torch")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_refused(photos, tmp_path):
    with pytest.raises(ConfigError, match="Unknown export format 'tflite'. There are onnx, torch, transformers"):
        export(build(), tmp_path / "out", "tflite")
    with pytest.raises(ConfigError, match="transductive_em classifies a set of images together"):
        export(fitted(photos, head="transductive_em"), tmp_path / "out")
    with pytest.raises(AdapterError, match="cannot be folded into the weights"):
        export(build(config=LilyConfig(r=4, target_modules=["q_proj"])), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_extra_is_named(monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    with pytest.raises(ConfigError, match=r"needs onnxscript: pip install 'lora-recycle\[onnx\]'"):
        export(build(), tmp_path / "out")


@pytest.mark.parametrize(
    "changes",
    [
        {"do_pad": True},
        {"do_normalize": False},
        {"rescale_factor": 1 / 127.5},
        {"size": {"shortest_edge": 32, "longest_edge": 64}},
        {"size": {"shortest_edge": 32}, "do_center_crop": False},
        {"size": {"shortest_edge": 30}},
        {"crop_size": {"height": 24, "width": 24}},
    ],
)
def test_a_processor_that_data_cannot_describe_is_refused(changes, monkeypatch, tmp_path):
    model = build("clip")
    for name, value in changes.items():
        monkeypatch.setattr(model.backbone.processor, name, value)
    with pytest.raises(ConfigError, match="tiny-clip: its image processor, CLIPImageProcessorPil, does more than"):
        export(model, tmp_path / "out", "torch")
    assert not (tmp_path / "out").exists()
