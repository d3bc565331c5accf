"""A private cache, one thread, and tiny models that every test may read but none may change."""

import os
import tempfile


# before huggingface is imported: it reads these once
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="lora-recycle-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["ACCELERATE_USE_CPU"] = "true"
for _name in ("HF_TOKEN", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE"):
    os.environ.pop(_name, None)

import shutil  # noqa: E402
import warnings  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from helpers_tiny import save_tiny_backbone, toy_images  # noqa: E402

from lora_recycle.inversion.config import InversionConfig  # noqa: E402
from lora_recycle.inversion.inverter import LoraInverter  # noqa: E402
from lora_recycle.pool import AdapterPool  # noqa: E402
from lora_recycle.tuning import tune_adapter  # noqa: E402
from lora_recycle.tuning_config import TuningConfig  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def private_home():
    torch.set_num_threads(1)
    yield
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_backbone_path(tmp_path_factory):
    """Folder of a random `ViTModel` (32 wide, 2 layers, 32x32 pixels, patches of 8) and its image processor."""
    return save_tiny_backbone(tmp_path_factory.mktemp("backbone") / "tiny-vit")


@pytest.fixture(scope="session")
def toy_data():
    """8 classes of 20 images, each class a colour with noise."""
    return toy_images()


@pytest.fixture(scope="session")
def tiny_pool_path(tmp_path_factory, tiny_backbone_path, toy_data):
    """Four adapters of 4 classes each: LoRA, LoRA on q and v only, DoRA, LoHa."""
    folder = tmp_path_factory.mktemp("pool")
    kinds = [("LORA", "all"), ("LORA", "q_proj,v_proj"), ("DORA", "all"), ("LOHA", "all")]
    for task, (kind, targets) in enumerate(kinds):
        config = TuningConfig(
            peft_type=kind, targets=targets, epochs=6, lr=8e-3, rank=4, keep_ratio=1.0, batch_size=16
        )
        classes = [task, task + 1, task + 2, task + 3]
        tune_adapter(toy_data, classes, folder / f"adapter-{task}", config, str(tiny_backbone_path), seed=task)
    return folder


@pytest.fixture(scope="session")
def tiny_pool(tiny_pool_path):
    return AdapterPool.from_pretrained(tiny_pool_path)


@pytest.fixture(scope="session")
def tiny_surrogate(tmp_path_factory, tiny_pool):
    """Surrogate data of `tiny_pool`: 6 images of each class, half of the patches kept."""
    config = InversionConfig(images_per_class=6, iterations=5, keep_ratio=0.5, jitter=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return LoraInverter(tiny_pool, config).run(tmp_path_factory.mktemp("surrogate"), progress=False)
