"""The page served to this machine, a browser that reaches nothing else, and images to drop."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from lora_recycle.modeling.meta_lora import MetaLoRAForFewShotClassification


COLOURS = {"red": (200, 30, 30), "green": (30, 180, 40), "blue": (30, 40, 200)}


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Five noisy 48-pixel PNG files of each colour, by its name."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    files = {}
    for name, colour in COLOURS.items():
        files[name] = [str(folder / f"{name}-{i}.png") for i in range(5)]
        for path in files[name]:
            pixels = np.clip(np.array(colour) + rng.integers(-30, 30, (48, 48, 3)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    return files


@pytest.fixture(scope="session")
def demo_model():
    return MetaLoRAForFewShotClassification.from_pretrained("demo")


@pytest.fixture(scope="module")
def browser():
    """Chromium, for which no host but this machine exists."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no chromium on this machine")
    from playwright.sync_api import sync_playwright

    options = ["--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=options)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def served():
    """The page with the shipped meta-LoRA: its address, and what it launched."""
    pytest.importorskip("gradio", reason="the extra [app] is not installed")
    from lora_recycle.app.page import launch

    page = launch("demo", browser=False)
    yield SimpleNamespace(url=page.local_url, page=page)
    page.close()


@pytest.fixture(scope="module")
def visitor(served):
    from helpers_page import Visitor  # httpx comes with Gradio

    return Visitor(served)


@pytest.fixture(scope="module")
def dropped(visitor, pictures):
    """Uploads of two pictures of each colour, in the form of an event."""
    from helpers_page import META, image

    return {name: [image(visitor.upload(path), meta=META) for path in paths[:2]] for name, paths in pictures.items()}
