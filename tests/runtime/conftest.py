"""A pool that loads at once, for processes that load it again and again, and what one process makes of it."""

import pytest
from helpers_tiny import TINY_LAYERS, GivenImages, save_tiny_adapter
from peft import LoraConfig

from lora_recycle.inversion.config import InversionConfig
from lora_recycle.inversion.inverter import LoRAInverter
from lora_recycle.pool.pool import AdapterPool


#: The settings of `INVERT` in `test_launch.py`.
CONFIG = InversionConfig(images_per_class=6, iterations=5, keep_ratio=0.5, jitter=0)


@pytest.fixture(scope="session")
def plain_pool_path(tmp_path_factory, tiny_backbone_path, toy_data):
    """Four LoRAs of 4 classes each."""
    folder = tmp_path_factory.mktemp("plain")
    for task in range(4):
        config = LoraConfig(r=4, lora_alpha=8, target_modules=TINY_LAYERS, modules_to_save=["classifier"])
        classes = list(range(task, task + 4))
        save_tiny_adapter(folder / f"adapter-{task}", tiny_backbone_path, toy_data, classes, config, seed=task)
    return folder


@pytest.fixture(scope="session")
def plain_pool(plain_pool_path):
    return AdapterPool.from_pretrained(plain_pool_path)


@pytest.fixture(scope="session")
def plain_surrogate(tmp_path_factory, plain_pool):
    """Surrogate data that is not optimised, to learn from."""
    return GivenImages(plain_pool, CONFIG).run(tmp_path_factory.mktemp("surrogate"), progress=False)


@pytest.fixture(scope="session")
def inverted(tmp_path_factory, plain_pool):
    """What one process makes, to compare with."""
    return LoRAInverter(plain_pool, CONFIG).run(tmp_path_factory.mktemp("inverted"), progress=False)
