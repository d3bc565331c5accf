"""Characters that a terminal, a locale or UTF-8 does not hold break nothing, least of all after the work."""

import ast
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers_tiny import random_pixels

import lora_recycle
from lora_recycle import AdapterError, DataError, MetaLoRAForFewShotClassification, SurrogateDataset
from lora_recycle.adapters.pull import pull_adapter
from lora_recycle.cli.main import main
from lora_recycle.errors import StorageError
from lora_recycle.hub.cards import surrogate_card
from lora_recycle.reports.surrogate_page import write_surrogate_page
from lora_recycle.runtime.outputs import check_output
from lora_recycle.runtime.terminal import utf8
from lora_recycle.surrogate.dataset import Shard, save_shard, write_manifest


PACKAGE = Path(lora_recycle.__file__).parent
NOT_UTF8 = os.fsdecode(b"caf\xe9")


def test_a_locale_of_ascii(tmp_path):
    script = Path(__file__).with_name("helpers_characters.py")
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "TRANSFORMERS_VERBOSITY": "error"}
    environment = os.environ | locale
    environment.pop("PYTHONIOENCODING", None)
    done = subprocess.run([sys.executable, script, tmp_path], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-3000:]
    assert rb"hi\udce9ver" in done.stdout and b"\xe9" not in done.stdout + done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_that_does_not_know_the_letters(encoding, monkeypatch, capsys):
    screen = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", screen)
    assert main(["inspect", "demo", "--short"]) == 0
    print("été €", flush=True)
    assert {"ascii": rb"\xe9t\xe9 \u20ac", "latin-1": b"\xe9t\xe9 \\u20ac"}[encoding] in screen.buffer.getvalue()


def test_files_are_opened_as_utf8_whatever_the_locale():
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and _opens_text(node):
                found.append(f"{path.relative_to(PACKAGE)}:{node.lineno}: {ast.unparse(node)}")
    assert found == []


def _opens_text(call: ast.Call) -> bool:
    """Whether a call opens, reads or writes a file as text in the locale's encoding."""
    method = call.func.attr if isinstance(call.func, ast.Attribute) else None
    if any(keyword.arg == "encoding" for keyword in call.keywords):
        return False
    if method in ("write_text", "read_text"):
        return True
    if isinstance(call.func, ast.Name) and call.func.id == "open" or method in ("fdopen", "TemporaryFile"):
        place = 1
    elif method == "open" and ast.unparse(call.func.value) not in ("Image", "os", "webbrowser"):
        place = 0
    else:
        return False
    modes = [*call.args[place : place + 1], *(k.value for k in call.keywords if k.arg == "mode")]
    return not any(isinstance(mode, ast.Constant) and "b" in str(mode.value) for mode in modes)


def test_half_a_character_in_labels_and_names(tmp_path):
    labels = ["\ud800", "same", "same"]
    adapter = {"name": "org/\udcff", "revision": None, "sha256": "0" * 64, "labels": labels, "num_classes": 3}
    pixels = random_pixels(6, 8)
    shard = Shard(adapter, pixels, torch.arange(6) % 3, torch.randn(6, 3), torch.randn(6, 4).half())
    save_shard(tmp_path / "shards" / "0.safetensors", shard, "id")
    write_manifest(tmp_path, {"config": {"starts": {"noise": 1.0}}}, [tmp_path / "shards" / "0.safetensors"])
    data = SurrogateDataset.from_pretrained(tmp_path)
    names = data.to_dataset().features["label"].names
    assert names == [r"org/\udcff/\ud800", r"org/\udcff/same (1)", r"org/\udcff/same (2)"]
    assert "\\udcff" in utf8(surrogate_card("org/data", data.manifest)).decode()
    assert r"\ud800" in write_surrogate_page(tmp_path / "page.html", data).read_text(encoding="utf-8")


def test_half_a_character_as_a_label_is_saved_and_loaded(tmp_path):
    model = MetaLoRAForFewShotClassification.from_pretrained("demo")
    pixels = random_pixels(4, 64)
    model.fit(pixels, ["\ud800", "x", "\ud800", "x"]).save_pretrained(tmp_path / "fitted")
    loaded = MetaLoRAForFewShotClassification.from_pretrained(tmp_path / "fitted")
    assert loaded.label_names == ["x", "\ud800"] and loaded.predict(pixels) == model.predict(pixels)


def test_a_folder_whose_name_is_not_utf8_is_refused_before_the_work(tmp_path):
    folder = tmp_path / NOT_UTF8
    with pytest.raises(StorageError, match="its path is not UTF-8, which safetensors needs; rename it"):
        check_output(folder)
    folder.mkdir()
    with pytest.raises(AdapterError, match="its path is not UTF-8"):
        pull_adapter(folder)
    with pytest.raises(DataError, match="its path is not UTF-8"):
        SurrogateDataset.from_pretrained(folder)
