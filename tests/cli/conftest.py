"""One pool, made by the verbs themselves, and ways to run a command."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

from lora_recycle.cli.main import main


CLASSES, IMAGES = 6, 8


def draw_photos(folder):
    """A folder of class folders of 32-pixel pictures, each class of its own colour."""
    rng = np.random.default_rng(0)
    for c in range(CLASSES):
        (folder / f"class {c}").mkdir(parents=True)
        colour = rng.integers(0, 200, 3)
        for i in range(IMAGES):
            pixels = (colour + rng.integers(0, 55, (32, 32, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"class {c}" / f"{i}.png")


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    """A folder with photos/, base/, pool/ (2 LoRAs and a LoHa), surrogate/ and meta/, each made by its verb."""
    folder = tmp_path_factory.mktemp("cli")
    draw_photos(folder / "photos")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = ViTConfig(**sizes, image_size=32, patch_size=8)
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder / "base")
    ViTImageProcessorPil(size={"height": 32, "width": 32}, resample=3).save_pretrained(folder / "base")
    tune = [
        "train-adapters",
        str(folder / "photos"),
        "--output",
        str(folder / "pool"),
        "--base-model",
        str(folder / "base"),
    ]
    tune += ["--classes", "4", "--epochs", "1", "--rank", "2", "--quiet"]
    assert main([*tune, "--tasks", "2"]) == 0
    assert main([*tune, "--tasks", "3", "--peft-type", "LOHA"]) == 0
    pool, surrogate = str(folder / "pool"), str(folder / "surrogate")
    invert = ["--images-per-class", "2", "--iterations", "2", "--keep-ratio", "0.5", "--quiet"]
    assert main(["invert", pool, "--output", surrogate, *invert]) == 0
    distill = ["--steps", "3", "--rank", "2", "--relational-batch", "12", "--quiet"]
    assert main(["distill", pool, "--surrogate", surrogate, "--output", str(folder / "meta"), *distill]) == 0
    return folder


@pytest.fixture
def fails(run):
    """Runs a command that must fail with one line, which it returns."""

    def command(*arguments):
        code, out, err = run(*arguments)
        assert code == 1 and out == ""
        assert err.startswith("lora-recycle: error: ") and err.count("\n") == 1 and "Traceback" not in err
        return err

    return command


@pytest.fixture
def evaluate_arguments(work):
    """A quick evaluation of the meta-LoRA."""
    numbers = ["--episodes", 20, "--ways", 3, "--shots", 1, "--quiet"]
    return ["evaluate", work / "meta", "--data", work / "photos", *numbers]
