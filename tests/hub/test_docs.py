"""The commands of docs/hub.md, run in their order against the local Hub."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

from helpers_clip import paper_tensors, save_tiny_pair, wear_lora
from helpers_hub import publish
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

from lora_recycle.cli.main import main


PAGE = Path(__file__).parents[2] / "docs" / "hub.md"


def blocks(section):
    """(language, code) of each fenced block below a heading, up to the next one of its level."""
    text = re.search(rf"^## {section}\n(.*?)(?=^## |\Z)", PAGE.read_text(encoding="utf-8"), re.M | re.S)[1]
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, re.M | re.S)


def run_blocks(section):
    """Run a section's blocks in their order: their languages, and what Python was left with."""
    names, run = {}, []
    for language, code in blocks(section):
        run.append(language)
        if language == "python":
            exec(compile(code, f"{PAGE}: {code.splitlines()[0]}", "exec"), names)
            continue
        for line in code.splitlines():
            program, *arguments = shlex.split(line)
            if program == "lora-recycle":
                assert main(arguments) == 0, line
            else:
                subprocess.run(["bash", "-ec", line], check=True)
    return run, names


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
    run, names = run_blocks("Publish")
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


def test_adapters_of_clip_and_siglip(hub, tmp_path, monkeypatch, capsys):
    base = "openai/clip-vit-base-patch16"
    save_tiny_pair(tmp_path / "clip")
    hub.put(base, tmp_path / "clip")
    for seed, name in enumerate(("pets", "land")):
        wear_lora(CLIPModel.from_pretrained(tmp_path / "clip"), tmp_path / "made" / name, base, seed)
        publish(hub, f"someone/clip-lora-{name}", tmp_path / "made" / name, base)
    save_file(paper_tensors(), tmp_path / "lora_0.safetensors")
    monkeypatch.chdir(tmp_path)
    run, names = run_blocks("Adapters of CLIP and SigLIP")
    assert run == ["bash", "bash", "python", "bash"]
    assert [adapter.num_classes for adapter in names["pool"]] == [3, 2]
    out = capsys.readouterr().out
    assert "cat, dog, fox" in out
    shards = json.loads(Path("both", "manifest.json").read_text())["shards"]
    assert [shard["adapter"]["labels"] for shard in shards] == [["cat", "dog", "fox"], ["forest", "river"]]
    assert Path("meta_clip", "adapter_model.safetensors").is_file()
    assert json.loads(Path("surrogate_0", "manifest.json").read_text())["shards"][0]["num_images"] == 10
    imported = load_file("adapters/lora_0/adapter_model.safetensors")
    assert imported["base_model.model.pooled_classifier.weight"].shape == (5, 32)
