"""The commands of docs/hub.md, run in their order against the local Hub."""

import re
import shlex
import shutil
from pathlib import Path

from PIL import Image

from lora_recycle.commands.main import main


PAGE = Path(__file__).parents[2] / "docs" / "hub.md"


def blocks(section):
    """(language, code) of each fenced block below a heading, up to the next one of its level."""
    text = re.search(rf"^## {section}\n(.*?)(?=^## |\Z)", PAGE.read_text(encoding="utf-8"), re.M | re.S)[1]
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, re.M | re.S)


def test_publish(hub, model, tiny_surrogate, tiny_pool_path, tmp_path, monkeypatch, capsys):
    model.save_pretrained(tmp_path / "meta_lora")
    shutil.copytree(tiny_surrogate.folder, tmp_path / "surrogate")
    shutil.copytree(tiny_pool_path / "adapter-0", tmp_path / "adapters" / "birds")
    config = tmp_path / "adapters" / "birds" / "adapter_config.json"
    config.write_text(re.sub(r'("base_model_name_or_path": )"[^"]*"', r'\1"org/tiny-vit"', config.read_text()))
    for name, colour in (("cat1", "red"), ("cat2", "orange"), ("dog1", "navy"), ("dog2", "blue"), ("new", "tomato")):
        Image.new("RGB", (40, 32), colour).save(tmp_path / f"{name}.jpg")
        if name != "new":
            (tmp_path / "examples" / name[:3]).mkdir(parents=True, exist_ok=True)
            shutil.copy(tmp_path / f"{name}.jpg", tmp_path / "examples" / name[:3])
    monkeypatch.chdir(tmp_path)
    names, run = {}, []
    for language, code in blocks("Publish"):
        run.append(language)
        if language == "python":
            exec(compile(code, f"{PAGE}: {code.splitlines()[0]}", "exec"), names)
            continue
        for line in code.splitlines():
            program, *arguments = shlex.split(line)
            assert program == "lora-recycle" and main(arguments) == 0, line
    assert run == ["bash", "python", "python", "python", "python", "bash"]
    out = capsys.readouterr().out
    assert (
        f"{hub.endpoint}/me/meta-lora\n{hub.endpoint}/datasets/me/surrogate\n{hub.endpoint}/me/vit-lora-birds" in out
    )
    assert names["url"] == f"{hub.endpoint}/me/meta-lora/tree/v2"
    assert hub.repo("me/surrogate", repo_type="dataset").private and len(names["images"]) == len(tiny_surrogate)
    assert hub.files("me/vit-lora-birds").keys() == {
        ".gitattributes",
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert "base_model: org/tiny-vit" in hub.files("me/vit-lora-birds")["README.md"].decode()
    best, other = names["classify"]("new.jpg")
    predicted = next(line for line in out.splitlines() if line.startswith("new.jpg"))
    assert best["label"] == predicted.split()[1] == "cat" and best["score"] > other["score"]
