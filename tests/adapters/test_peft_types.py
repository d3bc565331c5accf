"""Every adapter type that PEFT has is a teacher, or is refused because it steers text. The list is PEFT's own."""

import dataclasses
import json

import pytest
import torch
from helpers_adapters import ALL_LINEAR, ATTENTION, edit_config, headless_twin, tiny_classifier
from helpers_tiny import copied_state, same_weights, shake, tiny_processor
from peft import AdaLoraConfig, LoraConfig, MontecloraConfig, PeftType, VeloraConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora import Linear
from peft.tuners.lora.config import BdLoraConfig, KasaConfig

from lora_recycle.adapters.files import read_header
from lora_recycle.adapters.pull import pull_adapter
from lora_recycle.backbones.backbone import Backbone
from lora_recycle.errors import AdapterError
from lora_recycle.inversion.config import InversionConfig
from lora_recycle.inversion.inverter import LoRAInverter
from lora_recycle.pool.pool import AdapterPool


#: Types for the prompt, the token embeddings or the blocks of a text decoder.
TEXT_ONLY = {
    "ADAPTION_PROMPT",
    "CARTRIDGE",
    "CPT",
    "MULTITASK_PROMPT_TUNING",
    "PREFIX_TUNING",
    "PROMPT_TUNING",
    "P_TUNING",
    "SHADOW",
    "TRAINABLE_TOKENS",
    "XLORA",
}
TYPES = {kind.value: config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
TEACHERS = sorted(TYPES.keys() - TEXT_ONLY)
#: What a type needs on a model of width 32, where its defaults are made for a large one.
SMALL = {
    "ADALORA": {"total_step": 10},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 20},
    "IA3": {"feedforward_modules": ["fc1"]},
    "LN_TUNING": {"target_modules": ["layernorm_before"]},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 4, "r": 0},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 4},
    "VBLORA": {"vector_length": 8, "num_vectors": 16, "topk": 2},
    "WAVEFT": {"n_frequency": 50},
}
#: Types that compute with their input: no change of weights says what they do.
NO_WEIGHT_CHANGE = {"LILY", "POLY"}


def config_of(kind: str):
    options = {"target_modules": ["q_proj", "v_proj", "fc1"], "modules_to_save": ["classifier"]} | SMALL.get(kind, {})
    known = {field.name for field in dataclasses.fields(TYPES[kind])}
    return TYPES[kind](**{name: value for name, value in options.items() if name in known})


def trained(config, seed: int = 1):
    """A classifier that wears the adapter, every trainable number moved; a headless twin of its base; its images."""
    classifier = shake(tiny_classifier())
    twin, images = headless_twin(classifier), torch.randn(3, 3, 32, 32)
    wearing, generator = get_peft_model(classifier, config).eval(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in wearing.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return wearing, twin, images


@torch.no_grad()
def logits(pool, images):
    with pool.folded(0) as backbone:
        return pool[0].logits(backbone, backbone(images)[0])


def pool_of(folder, wearing, twin) -> AdapterPool:
    wearing.save_pretrained(folder)
    return AdapterPool.from_pretrained(folder, backbone=Backbone(twin, tiny_processor(), "twin"))


def test_the_list_is_all_that_peft_knows():
    """A type that a new PEFT adds is a teacher, tried below with its defaults, until somebody says it steers text."""
    assert TYPES.keys() == {kind.value for kind in PeftType} == TEXT_ONLY | set(TEACHERS)
    assert not SMALL.keys() - set(TEACHERS) and set(TEACHERS) > NO_WEIGHT_CHANGE


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", TEACHERS)
def test_an_adapter_of_every_type_answers_as_in_peft_and_is_inverted(tmp_path, kind):
    wearing, twin, images = trained(config_of(kind))
    task = {"task_ids": torch.zeros(3, dtype=torch.long)} if kind == "POLY" else {}
    with torch.no_grad():
        expected = wearing.base_model(pixel_values=images, **task).logits
    pool, before = pool_of(tmp_path, wearing, twin), copied_state(twin)
    head = wearing.base_model.model.classifier.modules_to_save["default"]
    with torch.no_grad():
        bare = head(pool.backbone.pool_for_head(pool.backbone(images)[0]))
    assert (expected - bare).abs().max() > 0.01  # the adapter does something
    torch.testing.assert_close(logits(pool, images), expected, rtol=1e-5, atol=1e-5)
    assert bool(pool[0].peft_layers) == (kind in NO_WEIGHT_CHANGE)
    shard = LoRAInverter(pool, InversionConfig(iterations=2, images_per_class=1, keep_ratio=0.5, jitter=0)).invert(0)
    torch.testing.assert_close(logits(pool, pool.backbone.normalize(shard.pixels)), shard.teacher_logits)
    assert same_weights(pool.backbone.model, before)


@pytest.mark.parametrize("kind", sorted(TEXT_ONLY))
def test_types_that_steer_text_are_refused(tmp_path, kind):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
    with pytest.raises(
        AdapterError, match=rf"{tmp_path.name}: adapter_config.json: adapters of type {kind} steer a text"
    ):
        pull_adapter(tmp_path)


LAYERS = [f"layers.{i}.{name}" for i in (0, 1) for name in ("attention.q_proj", "mlp.fc1")]
VARIANTS = {
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "dora": {"use_dora": True},
    "dora_and_rslora": {"use_dora": True, "use_rslora": True},
    "biases": {"lora_bias": True},
    "mixed_targets": {"target_modules": [*LAYERS, "layers.1.attention.o_proj"]},
    "a_pattern_of_targets": {"target_modules": r".*layers\.1\.(attention\.q_proj|mlp\.fc2)"},
    "all_linear": {"target_modules": "all-linear", "exclude_modules": ["classifier"]},
    "one_layer": {"layers_to_transform": [0]},
    "ranks": {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.fc1": 7}, "target_modules": ALL_LINEAR},
    "alphas": {"alpha_pattern": {r"layers\.0\..*fc2": 31, "fc1": 5}, "target_modules": ALL_LINEAR},
    "ranks_alphas_rslora": {"rank_pattern": {"v_proj": 5}, "alpha_pattern": {"v_proj": 9}, "use_rslora": True},
    "the_patches_too": {"target_modules": ["projection", "q_proj"]},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
    "monteclora": {"monteclora_config": MontecloraConfig(buffer_size=2)},
    "bdlora": {"use_bdlora": BdLoraConfig(target_modules_bd_a=["q_proj"], nblocks=2, match_strict=False)},
    "velora": {"velora_config": VeloraConfig()},
    "kasa": {"kasa_config": KasaConfig()},
}
#: What PEFT swaps a LoRA's layer for -> the variant above that does it, or why it is no teacher.
SWAPPED = {
    "use_dora": "dora",
    "use_bdlora": "bdlora",
    "velora_config": "velora",
    "monteclora_config": "monteclora",
    "mica": "mica",
    "kasa_config": "kasa",
    "arrow_config": None,  # routes between several LoRAs that are loaded; is no adapter of its own
    "alora_invocation_tokens": None,  # tokens of a text, after which it acts
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", VARIANTS)
def test_every_way_to_set_up_a_lora_answers_as_in_peft(tmp_path, name):
    options = {"target_modules": ATTENTION, "modules_to_save": ["classifier"], "r": 4, "lora_alpha": 8} | VARIANTS[
        name
    ]
    wearing, twin, images = trained(LoraConfig(**options))
    with torch.no_grad():
        expected = wearing(pixel_values=images).logits
    torch.testing.assert_close(logits(pool_of(tmp_path, wearing, twin), images), expected, rtol=1e-5, atol=1e-5)


def test_every_layer_that_peft_has_for_a_lora_is_in_the_list():
    known = {setting for settings in Linear.lora_variants.fget(None) for setting in settings}
    assert known == SWAPPED.keys() and {name for name in SWAPPED.values() if name} <= VARIANTS.keys()


@pytest.mark.filterwarnings("ignore")
def test_a_monteclora_is_inverted_and_its_noise_left_out(tmp_path):
    options = {"target_modules": ATTENTION, "modules_to_save": ["classifier"], "r": 4}
    wearing, twin, images = trained(LoraConfig(**options, monteclora_config=MontecloraConfig(buffer_size=2)))
    pool = pool_of(tmp_path, wearing, twin)
    assert "lora_monteclora_sampler" in str(read_header(tmp_path, "it").keys()) and not pool[0].peft_layers
    shard = LoRAInverter(pool, InversionConfig(iterations=2, images_per_class=1)).invert(0)
    torch.testing.assert_close(logits(pool, pool.backbone.normalize(shard.pixels)), shard.teacher_logits)
    edit_config(tmp_path, monteclora_config=None)
    with pytest.raises(AdapterError, match="holds unexpected .*lora_monteclora_sampler"):
        AdapterPool.from_pretrained(tmp_path, backbone=pool.backbone)


@pytest.mark.filterwarnings("ignore")
def test_an_adalora_whose_ranks_were_cut_answers_as_in_peft(tmp_path):
    config = AdaLoraConfig(init_r=4, total_step=9, target_modules=ALL_LINEAR, modules_to_save=["classifier"])
    wearing, twin, images = trained(config)
    names = [n.removeprefix("base_model.model.") for n, _ in wearing.named_parameters() if ".lora_E." in n]
    masks = {name: [rank < 1 + i % 4 for rank in range(4)] for i, name in enumerate(names)}
    wearing.base_model.rankallocator.mask_using_rank_pattern(wearing.base_model.model, masks)
    wearing.peft_config["default"].rank_pattern = masks
    with torch.no_grad():
        expected = wearing(pixel_values=images).logits
    torch.testing.assert_close(logits(pool_of(tmp_path, wearing, twin), images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_unilora_of_all_linear_layers_needs_its_head_to_be_saved_whole(tmp_path):
    wearing, twin, images = trained(TYPES["UNILORA"](target_modules="all-linear", modules_to_save=["classifier"]))
    with torch.no_grad():
        expected = wearing(pixel_values=images).logits
    torch.testing.assert_close(logits(pool_of(tmp_path / "a", wearing, twin), images), expected, rtol=1e-5, atol=1e-5)
    wearing, twin, images = trained(TYPES["UNILORA"](target_modules="all-linear"))
    with pytest.raises(AdapterError, match=r"shared by all layers, .* mean other layers here \(classifier\)"):
        pool_of(tmp_path / "b", wearing, twin)


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_without_weight_changes_teaches_but_has_no_average(tmp_path):
    wearing, twin, _ = trained(config_of("LILY"))
    lily = pool_of(tmp_path / "lily", wearing, twin)
    trained(config_of("LORA"))[0].save_pretrained(tmp_path / "lora")
    pool = AdapterPool.from_pretrained([tmp_path / "lily", tmp_path / "lora"], backbone=lily.backbone)
    for average in (pool.average, lambda: pool.folded().__enter__()):
        with pytest.raises(AdapterError, match="lily: adapters of type LILY change no weights"):
            average()
    assert pool.subset([1]).average()
    assert pool.similarity()[0, 1] == 0
    assert all(layer.base_layer is None for layer in pool[0].peft_layers.values())


@pytest.mark.filterwarnings("ignore")
def test_a_poly_of_several_tasks_is_refused(tmp_path):
    options = {"target_modules": ATTENTION, "modules_to_save": ["classifier"], "r": 2, "n_tasks": 3}
    wearing, twin, _ = trained(TYPES["POLY"](**options))
    with pytest.raises(AdapterError, match="holds 3 tasks"):
        pool_of(tmp_path, wearing, twin)
