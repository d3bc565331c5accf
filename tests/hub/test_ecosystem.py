"""What we push, in the hands of the libraries around us."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers_tiny import random_pixels
from peft import AutoPeftModel, PeftModel
from peft.utils.hotswap import hotswap_adapter
from PIL import Image
from transformers import AutoModel, pipeline

from lora_recycle import ConfigError, FewShotImageClassificationPipeline, MetaLoRAForFewShotClassification
from lora_recycle.errors import DataError


@pytest.fixture
def pushed(hub, make_model):
    """Two meta-LoRAs of one base, org/meta and org/other, and the features of 3 images by each and by the base."""
    pixel_values = torch.randn(3, 3, 32, 32)
    one, other = make_model(surrogate=None), make_model(("mit",), surrogate=None)
    one.push_to_hub("org/meta")
    other.push_to_hub("org/other")
    with torch.no_grad():
        features = {"org/meta": one.features(pixel_values), "org/other": other.features(pixel_values)}
        features["base"] = base().eval()(pixel_values).last_hidden_state[:, 0]
    assert all((features[name] - features["base"]).abs().max() > 1e-2 for name in ("org/meta", "org/other"))
    assert (features["org/meta"] - features["org/other"]).abs().max() > 1e-2
    return pixel_values, features


def base():
    return AutoModel.from_pretrained("org/tiny-vit", add_pooling_layer=False)


@torch.no_grad()
def check(model, pushed, name, **options):
    pixel_values, features = pushed
    hidden = model.eval()(pixel_values=pixel_values, **options).last_hidden_state[:, 0]
    torch.testing.assert_close(hidden, features[name], rtol=1e-4, atol=1e-5)


def test_peft_loads_and_merges(pushed):
    model = PeftModel.from_pretrained(base(), "org/meta")
    check(model, pushed, "org/meta")
    with model.disable_adapter():
        check(model, pushed, "base")
    merged = model.merge_and_unload()
    assert not any("lora" in name for name, _ in merged.named_parameters())
    check(merged, pushed, "org/meta")


def test_auto_peft_model_finds_the_base_at_its_commit(hub, pushed):
    sha = hub.repo("org/tiny-vit").resolve("main").sha
    hub.put(
        "org/tiny-vit", {"config.json": "{}", "model.safetensors": None}
    )  # the base moves on, the adapter does not
    model = AutoPeftModel.from_pretrained("org/meta")
    assert model.peft_config["default"].revision == sha
    check(model, pushed, "org/meta")


def test_transformers_loads_adapters(pushed):
    model = base()
    model.load_adapter("org/meta")
    check(model, pushed, "org/meta")
    model.load_adapter("org/other", adapter_name="other")
    model.set_adapter("other")
    check(model, pushed, "org/other")
    model.disable_adapters()
    check(model, pushed, "base")


@torch.no_grad()
def test_one_batch_wears_several(pushed):
    pixel_values, features = pushed
    model = PeftModel.from_pretrained(base(), "org/meta", adapter_name="meta").eval()
    model.load_adapter("org/other", adapter_name="other")
    names = ["other", "__base__", "meta"]
    hidden = model(pixel_values=pixel_values, adapter_names=names).last_hidden_state[:, 0]
    expected = torch.stack([features["org/other"][0], features["base"][1], features["org/meta"][2]])
    torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-5)


def test_hotswap(pushed):
    model = PeftModel.from_pretrained(base(), "org/meta")
    hotswap_adapter(model, "org/other", adapter_name="default")
    check(model, pushed, "org/other")
    hotswap_adapter(model, "org/meta", adapter_name="default")
    check(model, pushed, "org/meta")


# the pipeline


@pytest.fixture
def support(tmp_path):
    """File names of 4 pictures and their labels."""
    files = [str(tmp_path / f"{i}.png") for i in range(4)]
    for file, image in zip(files, random_pixels(4), strict=True):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file)
    return files, ["cat", "dog", "cat", "fox"]


def test_the_pipeline_is_registered_and_agrees_with_the_model(hub, model, support):
    model.push_to_hub("org/meta")
    images, labels = support
    pipe = pipeline(
        "few-shot-image-classification", model="org/meta", support_images=images, support_labels=labels, device="cpu"
    )
    assert isinstance(pipe, FewShotImageClassificationPipeline)
    expected = model.fit(images, labels).predict_proba(images)
    rows = pipe(images, batch_size=3)
    assert [row[0]["label"] for row in rows] == model.predict(images)
    for row, probabilities in zip(rows, expected, strict=True):
        assert [r["score"] for r in row] == sorted((r["score"] for r in row), reverse=True)
        ours = torch.tensor([r["score"] for r in sorted(row, key=lambda r: r["label"])])
        torch.testing.assert_close(ours, probabilities, rtol=1e-4, atol=1e-5)
    (best,) = pipe(Image.open(images[0]), top_k=1)
    assert best["label"] == rows[0][0]["label"] and best["score"] == pytest.approx(rows[0][0]["score"], rel=1e-4)


def test_the_pipeline_takes_its_support_set_at_a_call_too(hub, model, support):
    model.push_to_hub("org/meta")
    images, labels = support
    loaded = MetaLoRAForFewShotClassification.from_pretrained("org/meta")
    pipe = pipeline("few-shot-image-classification", model=loaded, device="cpu")
    with pytest.raises(DataError, match="no task yet"):
        pipe(images[0])
    with pytest.raises(ConfigError, match="go together"):
        pipe(images[0], support_images=images)
    first = pipe(images[0], support_images=images, support_labels=labels)
    assert {row["label"] for row in first} == {"cat", "dog", "fox"} and pipe(images[0]) == first
    second = pipe(images[0], support_images=images, support_labels=["x", "y", "y", "y"])
    assert second[0]["label"] == "x" and len(second) == 2


def test_a_revision_of_the_pipeline_is_the_meta_loras(hub, pushed, make_model):
    task = {"support_images": random_pixels(2), "support_labels": [0, 1], "device": "cpu"}
    model = make_model(init="zero", surrogate=None)
    model.push_to_hub("org/meta", revision="v2")
    with pytest.raises(OSError, match="v2"):
        pipeline("few-shot-image-classification", model="org/meta", revision="v2", **task)
    hub.put("org/tiny-vit", {"notes": ""}, revision="v2")
    pipe = pipeline("few-shot-image-classification", model="org/meta", revision="v2", **task)
    with torch.no_grad():
        assert torch.equal(pipe.model.features(pushed[0]), model.features(pushed[0]))


# the `hf` command


def test_hf_runs_us_as_an_extension(tmp_path):
    """The layout of `hf extensions install`, which downloads from GitHub, around the console script."""
    scripts = Path(sys.executable).parent
    folder = tmp_path / ".local" / "share" / "hf" / "extensions" / "hf-lora-recycle"
    folder.mkdir(parents=True)
    manifest = {"owner": "us", "repo": "hf-lora-recycle", "repo_id": "us/hf-lora-recycle", "type": "python"}
    manifest |= {"short_name": "lora-recycle", "executable_path": str(scripts / "hf-lora-recycle")}
    (folder / "manifest.json").write_text(json.dumps(manifest | {"installed_at": "2026-01-01T00:00:00+00:00"}))
    environment = {**os.environ, "HOME": str(tmp_path), "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
    hf = shutil.which("hf", path=str(scripts))
    done = subprocess.run([hf, "lora-recycle", "--version"], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()[0]) == (0, "lora-recycle"), done.stderr
    wrong = subprocess.run([hf, "lora-recycle", "push"], env=environment, capture_output=True, text=True)
    assert wrong.returncode == 2 and "REPO_ID" in wrong.stderr
