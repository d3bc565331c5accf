"""What one process makes, for launches of several to be compared with."""

import pytest

from lora_recycle.inversion.config import InversionConfig
from lora_recycle.inversion.inverter import LoRAInverter


@pytest.fixture(scope="session")
def tiny_inverted(tmp_path_factory, tiny_pool):
    """The tiny pool, inverted with the settings of `INVERT` in `test_launch.py`."""
    config = InversionConfig(images_per_class=6, iterations=5, keep_ratio=0.5, jitter=0)
    return LoRAInverter(tiny_pool, config).run(tmp_path_factory.mktemp("inverted"), progress=False)
