"""Adapters without a head get one from class names: the logits of zero-shot CLIP and SigLIP with the adapter worn."""

import shutil
import warnings
import weakref

import pytest
import torch
from helpers_adapters import edit_config
from helpers_clip import save_tiny_pair, tiny_tokenizer, wear_lora
from helpers_hub import publish
from helpers_tiny import random_pixels
from peft import LoraConfig, get_peft_model
from transformers import CLIPModel, CLIPVisionModel, ViTModel

from lora_recycle import AdapterPool, InversionConfig, LoRAInverter
from lora_recycle.adapters.class_names import name_classes
from lora_recycle.backbones.base_models import BaseModel
from lora_recycle.errors import AdapterError, ConfigError
from lora_recycle.surrogate.dataset import SurrogateDataset


NAMES = ["cat", "arctic fox", "dog"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    save_tiny_pair(folder / "clip")
    for seed, name in enumerate(("birds", "pets")):
        wear_lora(CLIPModel.from_pretrained(folder / "clip"), folder / "pool" / name, "clip", seed)
    return folder


@pytest.fixture
def pool_path(saved, tmp_path):
    """The folder of two adapters without heads, birds and pets, of the tiny CLIP in clip beside it."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    for name in ("birds", "pets"):
        edit_config(tmp_path / "pool" / name, base_model_name_or_path=str(tmp_path / "clip"))
    return tmp_path / "pool"


def card(folder, *labels):
    names = "".join(f"- {label}\n" for label in labels)
    (folder / "README.md").write_text(f"---\nlabels:\n{names}---\n# An adapter\n")


def zero_shot(wearing, texts, pixel_values, **padding):
    tokens = tiny_tokenizer()(texts, return_tensors="pt", **padding)
    return wearing(pixel_values=pixel_values, **tokens).logits_per_image


def worn_logits(pool, index, images):
    with pool.folded(index) as backbone:
        return pool[index].logits(backbone, backbone(backbone.normalize(images))[0])


@torch.no_grad()
@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_the_logits_are_those_of_the_whole_model_that_wears_the_adapter(hub, tmp_path, family):
    model = save_tiny_pair(tmp_path / "base", family)
    hub.put("org/base", tmp_path / "base")
    wearing = wear_lora(model, tmp_path / "adapter", "org/base")
    publish(hub, "org/lora", tmp_path / "adapter")
    images = random_pixels(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pool = AdapterPool.from_hub("org/lora", class_names=NAMES)
    padding = {"padding": True} if family == "clip" else {"padding": "max_length", "max_length": 40}
    texts = [f"a photo of a {name}." for name in NAMES]
    pixel_values = pool.backbone.normalize(images)
    expected = zero_shot(wearing, texts, pixel_values, **padding)
    torch.testing.assert_close(worn_logits(pool, 0, images), expected, rtol=1e-5, atol=1e-5)
    with wearing.disable_adapter():
        bare = zero_shot(wearing, texts, pixel_values, **padding)
    assert (expected - bare).abs().max() > 1e-2 and expected.std() > 1e-2  # adapter and images both matter
    assert pool[0].info.labels == tuple(NAMES) and pool[0].num_classes == 3
    other = AdapterPool.from_hub("org/lora", class_names=NAMES, prompt="{} seen from space", local_files_only=True)
    expected = zero_shot(wearing, [f"{name} seen from space" for name in NAMES], pixel_values, **padding)
    torch.testing.assert_close(worn_logits(other, 0, images), expected, rtol=1e-5, atol=1e-5)


def test_the_text_tower_is_loaded_once_for_all_adapters_and_freed(pool_path, monkeypatch):
    loaded, load = [], BaseModel.load

    def counted(base, model_class, *args, **kwargs):
        model = load(base, model_class, *args, **kwargs)
        if model_class is CLIPModel:
            loaded.extend((weakref.ref(model), weakref.ref(model.text_model)))
        return model

    monkeypatch.setattr(BaseModel, "load", counted)
    pool = AdapterPool.from_pretrained(pool_path, class_names={"birds": ["owl", "tit"], "pets": NAMES})
    assert [a.info.labels for a in pool] == [("owl", "tit"), tuple(NAMES)]
    assert [a.num_classes for a in pool] == [2, 3]
    assert len(loaded) == 2 and all(reference() is None for reference in loaded)
    AdapterPool.from_pretrained(pool_path)
    assert len(loaded) == 2  # nobody needs heads


def test_names_of_the_card_serve_inversion_and_the_users_go_before(pool_path, tmp_path):
    card(pool_path / "birds", "owl", "tit")
    assert AdapterPool.from_pretrained(pool_path / "birds")[0].head is None
    pool = AdapterPool.from_pretrained(pool_path / "birds", require_heads=True)
    assert pool[0].info.labels == ("owl", "tit")
    config = InversionConfig(iterations=1, images_per_class=2, jitter=0)
    surrogate = LoRAInverter(pool, config).run(tmp_path / "surrogate", progress=False)
    entry = surrogate.manifest["shards"][0]["adapter"]
    assert (entry["labels"], entry["prompt"]) == (["owl", "tit"], "a photo of a {}.")
    images = surrogate.shard(0).pixels
    with torch.no_grad():
        torch.testing.assert_close(surrogate.shard(0).teacher_logits, worn_logits(pool, 0, images))
    card(pool_path / "birds", "owl", "owl")
    with pytest.raises(AdapterError, match="^birds: has no classification head"):
        AdapterPool.from_pretrained(pool_path / "birds", require_heads=True)
    given = AdapterPool.from_pretrained(pool_path / "birds", class_names=["eagle", "emu", "kiwi"])
    assert given[0].info.labels == ("eagle", "emu", "kiwi")


def test_shards_of_other_class_names_or_prompts_are_of_another_recipe(pool_path, tmp_path):
    config, made = InversionConfig(iterations=1, images_per_class=1), []

    def run(resume=True, **options):
        pool = AdapterPool.from_pretrained(pool_path / "birds", **options)
        inverter = LoRAInverter(pool, config)
        inverter.run(tmp_path / "out", progress=False, resume=resume, on_shard=lambda name, _: made.append(name))

    run(class_names=NAMES)
    for options in ({"class_names": NAMES[::-1]}, {"class_names": NAMES, "prompt": "{}"}):
        with pytest.raises(ConfigError, match="holds surrogate data of another recipe"):
            run(**options)
    assert len(made) == 1
    run(resume=False, **options)
    run(**options)
    assert len(made) == 2
    assert SurrogateDataset.from_pretrained(tmp_path / "out").shard(0).adapter["prompt"] == "{}"


def test_adapters_that_cannot_be_inverted_are_skipped_with_their_reasons(pool_path):
    given = {"pets": NAMES}
    with pytest.raises(AdapterError, match="^birds: has no classification head, .*--class-names"):
        AdapterPool.from_pretrained(pool_path, class_names=given, require_heads=True)
    with pytest.warns(UserWarning, match="1 of 2 adapters skipped:\n- birds: has no classification head"):
        pool = AdapterPool.from_pretrained(pool_path, class_names=given, require_heads=True, on_error="skip")
    assert [a.info.name for a in pool] == ["pets"] and pool.skipped[0][0] == "birds"


@pytest.mark.parametrize("what", ["tower alone", "vit", "no tokenizer", "half"])
def test_a_base_without_a_usable_text_tower_says_what_to_do(pool_path, tiny_backbone_path, tmp_path, what):
    folder, base = pool_path / "birds", tmp_path / "clip"
    if what == "tower alone":
        CLIPVisionModel.from_pretrained(base).save_pretrained(base)
        message = "birds: has no head, and its class names make none: .*clip_vision_model model without a text tower"
    elif what == "vit":
        folder, base = tmp_path / "vit", tiny_backbone_path
        tower = ViTModel.from_pretrained(base, add_pooling_layer=False)
        get_peft_model(tower, LoraConfig(target_modules=["q_proj"])).save_pretrained(folder)
        message = "vit model without a text tower, .* Use adapters that have heads, or name the whole model"
    elif what == "no tokenizer":
        for path in base.glob("*token*"):
            path.unlink()
        message = "its tokenizer knows no word of 'a photo of a cat.'"
    else:
        model = CLIPModel.from_pretrained(base)
        state = {k: v for k, v in model.state_dict().items() if k != "text_projection.weight"}
        model.save_pretrained(base, state_dict=state)
        message = r"model.safetensors lacks 1 tensor\(s\) of the model: text_projection.weight"
    with pytest.raises(AdapterError, match=message):
        AdapterPool.from_pretrained(folder, base, class_names=NAMES)


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        (None, "cat, arctic fox,dog", {"birds": NAMES, "pets": NAMES}),
        ("names.txt", "cat\narctic fox\n\ndog\n", {"birds": NAMES, "pets": NAMES}),
        ("names.yaml", "- cat\n- arctic fox\n- dog\n", {"birds": NAMES, "pets": NAMES}),
        ("names.yaml", "birds: [owl, 7]\n", {"birds": ["owl", "7"], "pets": None}),
        ("names.json", '{"pets": ["cat", "dog"]}', {"birds": None, "pets": ["cat", "dog"]}),
    ],
)
def test_class_names_come_as_text_or_files(pool_path, tmp_path, file, text, expected):
    from lora_recycle.adapters.sources import BadAdapters, pull_adapters

    if file:
        (tmp_path / file).write_text(text)
    infos = pull_adapters(pool_path, BadAdapters("raise"))
    named = name_classes(infos, tmp_path / file if file else text)
    assert {info.name: info.labels for info in named} == {k: v and tuple(v) for k, v in expected.items()}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bird": NAMES}, "class names of bird: no such adapter here. Without a head: birds, pets"),
        ({"adapter-0": NAMES}, "class names of adapter-0: it has a head of its own"),
        ({"birds": "owl"}, "class names of birds: expected a list of names .* got 'owl'"),
        ({"birds": ["owl", False]}, "words such as no in quotes"),
        (["owl", "owl"], "class names: 'owl' is there twice"),
        ([], "class names: expected a list"),
        ("", "class names: expected a list"),
        ("none.yaml", "none.yaml: no readable class names"),
    ],
)
def test_bad_class_names_are_named(pool_path, tiny_pool_path, given, message):
    with pytest.raises(ConfigError, match=message):
        AdapterPool.from_pretrained([pool_path, tiny_pool_path / "adapter-0"], "anywhere", class_names=given)


def test_a_prompt_without_a_place_for_the_name_is_refused(pool_path):
    with pytest.raises(ConfigError, match="prompt must hold {}"):
        AdapterPool.from_pretrained(pool_path, class_names=NAMES, prompt="a photo")


@torch.no_grad()
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "text_projection"]])
def test_an_adapter_of_both_towers_reads_its_class_names_too(pool_path, tmp_path, targets):
    wearing = get_peft_model(CLIPModel.from_pretrained(tmp_path / "clip"), LoraConfig(r=2, target_modules=targets))
    for name, parameter in wearing.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.3)
    wearing.eval().save_pretrained(tmp_path / "both")
    if "text_projection" in targets:
        with pytest.raises(AdapterError, match="text_projection.*of what makes a text's embedding only its tower"):
            AdapterPool.from_pretrained(tmp_path / "both", class_names=NAMES)
        return
    pool, images = AdapterPool.from_pretrained([tmp_path / "both", pool_path], class_names=NAMES), random_pixels(3)
    pixel_values = pool.backbone.normalize(images)
    expected = zero_shot(wearing, [f"a photo of a {name}." for name in NAMES], pixel_values, padding=True)
    torch.testing.assert_close(worn_logits(pool, 0, images), expected, rtol=1e-5, atol=1e-5)
    other = pool[1]
    with pool.folded(0) as backbone:  # the texts' half is not nothing
        without = other.logits(backbone, backbone(pixel_values)[0])
    assert (expected - without).abs().max() > 1e-2
