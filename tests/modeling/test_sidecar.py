"""Sidecars of earlier versions are read under the names of their time."""

import json

import pytest
from helpers_old_names import as_format_1

from lora_recycle.distillation.config import DistillationConfig
from lora_recycle.errors import AdapterError
from lora_recycle.modeling.meta_lora import MetaLoRAForFewShotClassification
from lora_recycle.modeling.sidecar import FORMAT_VERSION, read_sidecar


@pytest.mark.parametrize("head", ["prototypes", "euclidean_prototypes", "lda"])
def test_old_names_of_heads_and_settings_lead_to_the_same_settings(folder, tmp_path, head):
    model = MetaLoRAForFewShotClassification.from_pretrained(folder, head=head)
    model.settings |= {"distillation": DistillationConfig(validation_fraction=0.3, eval_steps=7).to_dict()}
    model.settings |= {"head_parameters": {"cosine_prototypes": {"temperature": 0.3}}}
    model.save_pretrained(tmp_path / "new")
    path = tmp_path / "new" / "meta_lora_config.json"
    written = json.loads(path.read_text())
    assert written["format_version"] == FORMAT_VERSION and written["head"] == head
    expected = read_sidecar(path)
    path.write_text(json.dumps(as_format_1(written)))
    assert {**read_sidecar(path), "format_version": FORMAT_VERSION} == expected
    assert MetaLoRAForFewShotClassification.from_pretrained(tmp_path / "new").head.name == head


@pytest.mark.parametrize("version", [0, 3, "2", None, [2]])
def test_a_sidecar_of_another_format_is_refused_by_its_name(folder, tmp_path, version):
    path = tmp_path / "meta_lora_config.json"
    path.write_text(json.dumps({"format_version": version}))
    with pytest.raises(AdapterError, match="meta_lora_config.json: the sidecar has format .*reads 1 and 2"):
        read_sidecar(path)


@pytest.mark.parametrize("damaged", [{"head": ["class_centres"]}, {"head_parameters": []}, {"head": "knn"}])
def test_a_damaged_sidecar_of_format_1_is_refused(tmp_path, damaged):
    path = tmp_path / "meta_lora_config.json"
    path.write_text(json.dumps(damaged))
    with pytest.raises(AdapterError, match="meta_lora_config.json: "):
        read_sidecar(path)
