"""`lora-recycle export`: what it writes and says."""

import json

import pytest
import torch

from lora_recycle import MetaLoRAForFewShotClassification
from lora_recycle.runtime.outputs import MARKER


def test_export_of_a_task_prints_its_files(work, tmp_path, run):
    code, out, err = run("export", work / "meta", "--task", work / "photos", "--output", tmp_path, "--format", "torch")
    assert code == 0 and out.splitlines()[0].split() == ["file", "bytes"]
    assert [line.split()[0] for line in out.splitlines()[1:]] == [
        str(tmp_path / name) for name in ("export.json", "model.pt2")
    ]
    assert "6 probabilities" in err and "verified with batches of 1, 2, 7" in err
    assert json.loads((tmp_path / "export.json").read_text())["label_names"] == [f"class {c}" for c in range(6)]
    model = MetaLoRAForFewShotClassification.from_pretrained(work / "meta")
    pictures = sorted((work / "photos").rglob("*.png"))
    model.fit(pictures, [path.parent.name for path in pictures])
    found = torch.export.load(tmp_path / "model.pt2").module()(model.preprocess(pictures[::5]))
    torch.testing.assert_close(found, model.predict_proba(pictures[::5]), atol=1e-4, rtol=1e-3)


def test_export_of_a_network_has_no_place_for_a_task(work, tmp_path, run, fails):
    command = ["export", work / "meta", "--output", tmp_path / "vit", "--format", "transformers"]
    assert "holds only the network" in fails(*command, "--task", work / "photos")
    code, out, err = run(*command)
    names = {"config.json", "export.json", "model.safetensors", "preprocessor_config.json"}
    assert code == 0 and {path.name for path in (tmp_path / "vit").iterdir()} == {*names, MARKER} and MARKER not in out
    assert all(name in out for name in names) and "16 embeddings" in err


def test_export_needs_a_folder_to_write_to(work, run):
    with pytest.raises(SystemExit) as stop:
        run("export", work / "meta")
    assert stop.value.code == 2
