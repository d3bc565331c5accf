"""docs/baselines.md: its Python runs in its order, and its tables name every method that there is."""

import re
import shutil
from pathlib import Path

from safetensors import safe_open

from lora_recycle.cli.evaluate import EPILOG
from lora_recycle.evaluation.config import all_methods


PAGE = (Path(__file__).parents[2] / "docs" / "baselines.md").read_text(encoding="utf-8")


def test_the_python_of_the_page(tiny_pool_path, tmp_path, monkeypatch):
    shutil.copytree(tiny_pool_path, tmp_path / "adapters")
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S):
        exec(compile(code, f"docs/baselines.md: {code.splitlines()[0]}", "exec"), names)
    assert names["scores"].shape == (4, 2) and names["features"].shape == (4, 32)
    assert len(names["surrogate"]) == 32
    with safe_open("ties/adapter_model.safetensors", "pt") as file:
        assert any(file.get_tensor(key).any() for key in file.keys() if "lora_B" in key)  # noqa: SIM118


def test_page_and_help_name_every_method():
    told = set(re.findall(r"[\w-]+", EPILOG.split("methods:")[1]))
    assert set(all_methods()) <= told and all(f"`{method}`" in PAGE for method in all_methods())
