import pytest

from lora_recycle import DistillationConfig, MetaLoRATrainer


@pytest.fixture(scope="module")
def folder(tiny_pool, tmp_path_factory):
    """A meta-LoRA as it is saved."""
    student = MetaLoRATrainer(tiny_pool, None, DistillationConfig(steps=0, rank=4)).train(progress=False)
    path = tmp_path_factory.mktemp("meta")
    student.to_model().save_pretrained(path)
    return path
