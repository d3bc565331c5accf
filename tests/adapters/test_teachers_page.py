"""docs/teachers.md: each row of its table is made and pooled, or refused as it says, and its blocks run in order."""

import re
import shlex
import shutil
from pathlib import Path

import peft
import pytest
import torch
from helpers_adapters import ATTENTION, randomise, save_adapter, tiny_classifier
from helpers_clip import save_tiny_pair, wear_lora
from helpers_tiny import shake, tiny_processor, tiny_vit, toy_images
from peft import LoraConfig, get_peft_model
from PIL import Image
from test_checkpoints import FOOD, fine_tuned
from test_foreign_types import Hydra, tuned
from test_other_names import open_clip_pair, save, timm_pair
from transformers import CLIPModel

from lora_recycle import AdapterPool, pull_adapter
from lora_recycle.adapters.checkpoints import save_checkpoint
from lora_recycle.backbones.backbone import Backbone
from lora_recycle.cli.main import main
from lora_recycle.errors import AdapterError


PAGE = Path(__file__).parents[2] / "docs" / "teachers.md"
ROWS = re.findall(r"^\| (?!what lies|---)(.+?) \| (yes|no)(.*?) \| (.*?) ?\|$", PAGE.read_text(encoding="utf-8"), re.M)


def twin():
    return Backbone(tiny_vit(), tiny_processor(), "twin")


def headed(folder, **options):
    """A LoRA as PEFT saves it; its base."""
    config = LoraConfig(
        r=4, target_modules=ATTENTION, modules_to_save=["classifier", *options.pop("beside", ())], **options
    )
    return {"backbone": Backbone(save_adapter(folder / "lora", config)[1], tiny_processor(), "twin")}


def checkpoint(folder, **options):
    fine_tuned(**options).save_pretrained(folder / "food")
    return {"backbone": twin()}


def merged(folder):
    base = Backbone(shake(tiny_classifier()).vit, tiny_processor(), "twin")
    wearing = get_peft_model(shake(tiny_classifier()), LoraConfig(r=2, lora_alpha=1, target_modules=["q_proj"]))
    randomise(wearing)
    wearing.merge_and_unload().save_pretrained(folder / "merged")
    return {"backbone": base}


def timm(folder):
    model, backbone = timm_pair()
    wearing = get_peft_model(model, LoraConfig(target_modules=["qkv"], modules_to_save=["head"]))
    save(wearing, folder / "timm")
    return {"backbone": backbone}


def open_clip(folder):
    model, backbone = open_clip_pair()
    save(get_peft_model(model, LoraConfig(target_modules=["c_fc"])), folder / "open", "open_clip.model")
    return {"backbone": backbone, "support": toy_images()}


def in_sub_folders(folder):
    headed(folder / "deep")
    return headed(folder / "deeper" / "still")


def of_a_run(folder):
    headed(folder)
    for step in (500, 1000):
        shutil.copytree(folder / "lora", folder / "run" / f"checkpoint-{step}")
    shutil.rmtree(folder / "lora")
    return headed(folder / "spare") | {"sources": [folder / "run"]}


def own_classifier(folder):
    model = shake(tiny_classifier())
    model.save_pretrained(folder / "base")
    tiny_processor().save_pretrained(folder / "base")
    get_peft_model(model, LoraConfig(target_modules=["q_proj", "classifier"])).save_pretrained(folder / "lora")
    return {"base_model": folder / "base", "sources": [folder / "lora"]}


def headless(folder):
    save_adapter(folder / "lora", LoraConfig(target_modules=ATTENTION))
    return {"backbone": twin(), "support": toy_images()}


def clip(folder, **options):
    save_tiny_pair(folder / "base")
    model = CLIPModel.from_pretrained(folder / "base")
    if options:
        get_peft_model(model, LoraConfig(**options)).save_pretrained(folder / "lora")
    else:
        wear_lora(model, folder / "lora", "base")
    return {"base_model": folder / "base", "sources": [folder / "lora"], "class_names": ["cat", "dog"]}


def foreign(folder):
    head = {"classifier.weight": torch.randn(2, 32)}
    save_checkpoint(folder / "hydra", tuned(Hydra)[1] | head, twin())
    return {"backbone": twin()}


def pickled(folder):
    options = headed(folder)
    (folder / "lora" / "adapter_model.safetensors").rename(folder / "lora" / "adapter_model.bin")
    return options


#: What makes each row in a folder, and returns the arguments of the pool that takes it; what refuses it says.
MAKERS = {
    "a PEFT adapter with its head": headed,
    "a whole fine-tuned checkpoint (`ViTForImageClassification`, ...)": checkpoint,
    "an adapter that was merged into its model": merged,
    "a checkpoint or an adapter of a timm ViT, DeiT or DINOv2": timm,
    "an adapter of an OpenCLIP model": open_clip,
    "an adapter in a sub-folder of a repo": lambda folder: headed(folder / "deep" / "er"),
    "several adapters in one repo or folder": in_sub_folders,
    "the `checkpoint-*` folders of a training run": of_a_run,
    "a LoRA with tuned biases or other layers in `modules_to_save`": lambda folder: headed(
        folder, beside=["layernorm"], bias="lora_only"
    ),
    "a LoRA on the classifier of its base model": own_classifier,
    "an adapter whose head was not saved": headless,
    "a LoRA of CLIP or SigLIP, of the image tower or of both": lambda folder: clip(folder, target_modules=ATTENTION),
    "a checkpoint with several labels per image": lambda folder: checkpoint(
        folder, problem_type="multi_label_classification"
    ),
    "an adapter of a type that PEFT lacks": foreign,
    "pickled weights alone (`.bin`)": pickled,
    "a checkpoint of another base model": lambda folder: checkpoint(folder, base_seed=1),
    "a checkpoint of another size or resolution": lambda folder: checkpoint(folder) | {"backbone": wider()},
    "a LoRA of the text tower alone": lambda folder: clip(folder, target_modules="text_model.*q_proj"),
}
REFUSED = {
    "pickled weights alone (`.bin`)": "convert a copy .*python -c",
    "a checkpoint of another base model": "made from another base model",
    "a checkpoint of another size or resolution": "must be of the same shape|made from another base model",
    "a LoRA of the text tower alone": "changes the text tower alone",
}


def wider():
    return Backbone(tiny_vit(intermediate_size=96), tiny_processor(), "wider")


def test_every_row_is_made_and_every_refusal_has_its_message():
    named = [row[0] for row in ROWS]
    assert named == list(MAKERS) and {row[0] for row in ROWS if row[1] == "no"} == REFUSED.keys()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:40])
def test_each_row_is_a_teacher_or_refused_as_the_page_says(tmp_path, row):
    options = MAKERS[row[0]](tmp_path)
    sources = options.pop("sources", [tmp_path])
    if row[1] == "no":
        with pytest.raises(AdapterError, match=REFUSED[row[0]]):
            AdapterPool.from_pretrained(sources, require_heads=True, **options)
        return
    pool = AdapterPool.from_pretrained(sources, require_heads=True, **options)
    assert len(pool) == (2 if row[0].startswith("several") else 1) and pool[0].num_classes >= 2
    with pool.folded(0) as backbone, torch.no_grad():
        assert pool[0].logits(backbone, backbone(torch.randn(2, 3, 32, 32))[0]).isfinite().all()


@pytest.fixture
def shown(hub, tiny_backbone_path, tiny_pool_path, tmp_path, monkeypatch):
    """What the page talks about, on the Hub, and its photos."""
    base = "google/vit-base-patch16-224-in21k"
    hub.put(base, tiny_backbone_path)
    fine_tuned().save_pretrained(tmp_path / "food")
    hub.put("someone/vit-finetuned-food", tmp_path / "food")
    files = {path.name: path.read_bytes() for path in (tiny_pool_path / "adapter-0").iterdir()}
    config = re.sub(rb'("base_model_name_or_path": )"[^"]*"', rb'\1"%s"' % base.encode(), files["adapter_config.json"])
    files["adapter_config.json"] = config
    hub.put("someone/vit-lora-birds", files)
    hub.put("someone/many-loras", {f"pets/{name}": data for name, data in files.items()})
    save_adapter(tmp_path / "bare", LoraConfig(target_modules=ATTENTION))
    bare = {path.name: path.read_bytes() for path in (tmp_path / "bare").iterdir()}
    settings = peft.LoraConfig(target_modules=ATTENTION, base_model_name_or_path=base)
    settings.save_pretrained(tmp_path / "config")
    hub.put(
        "someone/vit-lora-headless",
        bare | {"adapter_config.json": (tmp_path / "config" / "adapter_config.json").read_bytes()},
    )
    for name, colour in (("cat", "red"), ("dog", "blue")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (40, 32), colour).save(tmp_path / "photos" / name / f"{i}.jpg")
    monkeypatch.chdir(tmp_path)
    return hub


def test_the_blocks_of_the_page_run(shown, capsys):
    names, text = {}, PAGE.read_text(encoding="utf-8")
    for language, code in re.findall(r"^```(\w+)\n(.*?)^```$", text, re.M | re.S):
        if language == "python":
            exec(compile(code, str(PAGE), "exec"), names)
            continue
        for words in map(shlex.split, code.splitlines()):
            small = ["--images-per-class", "1", "--iterations", "1"] if words[1] == "invert" else []
            assert main([*words[1:], *small, "--quiet"]) == 0, code
    assert [(info.name, info.peft_type) for info in names["pool"].infos] == [
        ("someone/vit-finetuned-food", "CHECKPOINT"),
        ("someone/vit-lora-birds", "LORA"),
    ]
    assert names["pool"].infos[0].labels == tuple(FOOD.values()) and 0.5 <= names["result"].energy < 1
    assert pull_adapter("lora").rank == 16 and Path("fitted", "manifest.json").is_file()
    assert "someone/many-loras/pets" in capsys.readouterr().out
    assert AdapterPool.from_pretrained("tuned", backbone=names["pool"].backbone)[0].head is None
