"""What is pushed in several tests: a meta-LoRA whose base and sources lie on the local Hub."""

import pytest

from lora_recycle.backbones.backbone import Backbone
from lora_recycle.distillation.config import DistillationConfig
from lora_recycle.distillation.saving import wrap_student
from lora_recycle.distillation.trainer import MetaLoraTrainer
from lora_recycle.pool.pool import AdapterPool


def adapter_files(folder, license):
    """The files of an adapter folder with a card that states a licence (None: states none)."""
    stated = f"license: {license}\n" if license else ""
    names = ("adapter_config.json", "adapter_model.safetensors")
    return {name: (folder / name).read_bytes() for name in names} | {"README.md": f"---\n{stated}---\n# An adapter\n"}


@pytest.fixture
def make_model(hub, tiny_backbone_path, tiny_pool_path, tiny_surrogate):
    """Makes a meta-LoRA of org/adapter-0 and -1 for org/tiny-vit, all on the Hub; `licenses` are the adapters'."""

    def make(licenses=("apache-2.0", "apache-2.0"), surrogate=tiny_surrogate, **config):
        if not hub.exists("org/tiny-vit"):
            hub.put("org/tiny-vit", tiny_backbone_path)
        for i, license in enumerate(licenses):
            hub.put(f"org/adapter-{i}", adapter_files(tiny_pool_path / f"adapter-{i}", license))
        backbone = Backbone.from_pretrained("org/tiny-vit")
        backbone.revision = hub.repo("org/tiny-vit").resolve("main").sha
        pool = AdapterPool.from_pretrained([f"org/adapter-{i}" for i in range(len(licenses))], backbone=backbone)
        settings = DistillationConfig(**{"steps": 0, "rank": 4, **config})
        return wrap_student(MetaLoraTrainer(pool, surrogate, settings))

    return make


@pytest.fixture
def model(make_model):
    return make_model()
