"""Names of timm, OpenCLIP and wrappers, and what else PEFT saves beside its layers: each answers as its own model."""

import json

import peft
import pytest
import torch
import torch.nn.functional as F
from helpers_adapters import (
    ATTENTION,
    edit_config,
    edit_tensors,
    headless_twin,
    randomise,
    save_adapter,
    tiny_classifier,
)
from helpers_clip import TEXT
from helpers_tiny import SIZES, shake, tiny_processor, tiny_vit
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, Dinov2Config, Dinov2Model

from lora_recycle import AdapterPool
from lora_recycle.adapters.other_names import translate
from lora_recycle.adapters.usability import check_usable
from lora_recycle.backbones.backbone import Backbone
from lora_recycle.errors import AdapterError


class TimmAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class TimmMlp(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class TimmBlock(nn.Module):
    def __init__(self, width, heads, inner, scales):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-12 if not scales else 1e-6) for _ in range(2))
        self.attn, self.mlp = TimmAttention(width, heads), TimmMlp(width, inner)
        if scales:
            self.ls1, self.ls2 = Scale(width), Scale(width)
        else:
            self.ls1 = self.ls2 = nn.Identity()

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class Scale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * self.gamma


class TimmVit(nn.Module):
    """A ViT as timm writes it, of the sizes of the tiny backbone."""

    def __init__(self, classes=3, scales=False):
        super().__init__()
        width = SIZES["hidden_size"]
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, 8, 8)
        self.cls_token, self.pos_embed = (
            nn.Parameter(torch.zeros(1, 1, width)),
            nn.Parameter(torch.zeros(1, 17, width)),
        )
        inner = 4 * width if scales else SIZES["intermediate_size"]
        self.blocks = nn.Sequential(*(TimmBlock(width, 2, inner, scales) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(width, eps=1e-12 if not scales else 1e-6), nn.Linear(width, classes)

    def forward(self, x):
        x = self.patch_embed.proj(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


def save(wearing, folder, library="timm.models.vision_transformer"):
    """As PEFT saves it, where the model's class is of that library."""
    wearing.save_pretrained(folder)
    edit_config(folder, auto_mapping={"base_model_class": "VisionTransformer", "parent_library": library})


def timm_pair(scales=False):
    """A timm model and the backbone of transformers with the same weights."""
    twin = tiny_vit() if not scales else shake(Dinov2Model(Dinov2Config(**SIZES, mlp_ratio=4)))
    timm, own = TimmVit(scales=scales).eval(), twin.state_dict()
    layers = "encoder.layer" if scales else "layers"
    norms = ("norm1", "norm2") if scales else ("layernorm_before", "layernorm_after")
    state = {
        "cls_token": own["embeddings.cls_token"],
        "pos_embed": own["embeddings.position_embeddings"],
        "head.weight": 0.3 * torch.randn(3, 32),
        "head.bias": torch.randn(3),
    }
    for part in ("weight", "bias"):
        state[f"patch_embed.proj.{part}"] = own[f"embeddings.patch_embeddings.projection.{part}"]
        state[f"norm.{part}"] = own[f"layernorm.{part}"]
        for i in range(2):
            mine, theirs = f"blocks.{i}", f"{layers}.{i}"
            qkv = [own[f"{theirs}.attention.{name}_proj.{part}"] for name in "qkv"]
            state[f"{mine}.attn.qkv.{part}"] = torch.cat(qkv)
            state[f"{mine}.attn.proj.{part}"] = own[f"{theirs}.attention.o_proj.{part}"]
            for number, norm in enumerate(norms, 1):
                state[f"{mine}.norm{number}.{part}"] = own[f"{theirs}.{norm}.{part}"]
            for layer in ("fc1", "fc2"):
                state[f"{mine}.mlp.{layer}.{part}"] = own[f"{theirs}.mlp.{layer}.{part}"]
            if scales:
                for number in (1, 2):
                    state[f"{mine}.ls{number}.gamma"] = own[f"{theirs}.layer_scale{number}.lambda1"]
    timm.load_state_dict(state)
    return timm, Backbone(twin, tiny_processor(), "twin")


@torch.no_grad()
def logits(pool, pixel_values):
    with pool.folded(0) as backbone:
        head = pool[0].own_head()
        read = backbone.pool_features if head.in_features == backbone.hidden_size else backbone.pool_for_head
        return F.linear(read(backbone(pixel_values)[0]), head.weight, head.bias)


@torch.no_grad()
@pytest.mark.parametrize("scales", [False, True], ids=["vit", "dinov2"])
@pytest.mark.parametrize("kind", ["lora", "dora", "loha"])
def test_an_adapter_of_timm_answers_as_its_timm_model(tmp_path, kind, scales):
    timm, backbone = timm_pair(scales)
    layers = {"target_modules": ["qkv", "proj", "fc1"], "modules_to_save": ["head"], "r": 4}
    layers["exclude_modules"] = ["patch_embed.proj"]
    config = peft.LoHaConfig(**layers) if kind == "loha" else LoraConfig(use_dora=kind == "dora", **layers)
    wearing, images = get_peft_model(timm, config).eval(), torch.randn(3, 3, 32, 32)
    before = wearing(images)
    randomise(wearing)
    save(wearing, tmp_path)
    expected = wearing(images)
    assert (expected - before).abs().max() > 0.1
    pool = AdapterPool.from_pretrained(tmp_path, backbone=backbone)
    torch.testing.assert_close(logits(pool, images), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_checkpoint_of_timm_is_a_teacher(tmp_path):
    timm, backbone = timm_pair()
    for parameter in timm.parameters():
        parameter += 0.02 * torch.randn_like(parameter)
    save_file(timm.state_dict(), tmp_path / "model.safetensors")
    settings = {"architecture": "vit_tiny", "num_classes": 3, "label_names": ["cat", "dog", "fox"]}
    (tmp_path / "config.json").write_text(json.dumps(settings | {"pretrained_cfg": {"num_classes": 3}}))
    pool, images = AdapterPool.from_pretrained(tmp_path, backbone=backbone), torch.randn(3, 3, 32, 32)
    assert pool.infos[0].labels == ("cat", "dog", "fox")
    torch.testing.assert_close(logits(pool, images), timm(images), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_cut_into_q_k_and_v_says_the_way_out(tmp_path):
    timm, backbone = timm_pair()
    for name, config in {
        "lokr": peft.LoKrConfig(r=2, target_modules=["qkv"]),
        "pattern": LoraConfig(r=2, target_modules=["qkv"], rank_pattern={r"blocks\.0\.attn\.qkv": 4}),
    }.items():
        save(get_peft_model(timm_pair()[0], config), tmp_path / name)
        with pytest.raises(AdapterError, match=f"{name}: .*q, k and v as one matrix.*merge_and_unload"):
            AdapterPool.from_pretrained(tmp_path / name, backbone=backbone)


class OpenClipBlock(nn.Module):
    def __init__(self, width, heads, inner):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, inner))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(inner, width))

    def forward(self, x):
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class OpenClip(nn.Module):
    """CLIP as OpenCLIP writes it: the image tower under `visual`, the text tower beside it."""

    def __init__(self):
        super().__init__()
        self.visual, self.transformer = nn.Module(), nn.Module()
        for tower in (self.visual, self):
            tower.transformer = nn.Module()
            tower.transformer.resblocks = nn.ModuleList(OpenClipBlock(32, 2, 64) for _ in range(2))
        visual = self.visual
        visual.conv1 = nn.Conv2d(3, 32, 8, 8, bias=False)
        visual.class_embedding = nn.Parameter(torch.randn(32))
        visual.positional_embedding = nn.Parameter(torch.randn(17, 32))
        visual.ln_pre, visual.ln_post = nn.LayerNorm(32), nn.LayerNorm(32)
        visual.proj = nn.Parameter(torch.randn(32, 24))
        self.token_embedding, self.ln_final = nn.Embedding(TEXT["vocab_size"], 32), nn.LayerNorm(32)

    def encode(self, x):
        visual = self.visual
        x = visual.conv1(x).flatten(2).transpose(1, 2)
        x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], 1) + visual.positional_embedding
        x = visual.ln_pre(x)
        for block in visual.transformer.resblocks:
            x = block(x)
        return visual.ln_post(x[:, 0])

    forward = encode


def open_clip_pair():
    ours = shake(CLIPVisionModel(CLIPVisionConfig(**SIZES, hidden_act="gelu")))
    theirs, own = shake(OpenClip(), seed=1), ours.state_dict()
    pieces = translate(theirs.state_dict(), "clip_vision_model")
    state = theirs.state_dict()
    for key, piece in pieces.items():
        rows = own[key]
        part = state[piece.key] if piece.third is None else state[piece.key].chunk(3)[piece.third]
        part.copy_(rows)
    assert pieces.keys() == own.keys()  # no weight of ours is without one of theirs
    return theirs, Backbone(ours, tiny_processor(), "clip")


@torch.no_grad()
def test_an_adapter_of_open_clip_answers_as_its_model(tmp_path):
    theirs, backbone = open_clip_pair()
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(backbone.features(images), theirs(images), rtol=1e-4, atol=1e-4)
    config = LoraConfig(r=4, target_modules=["attn", "c_fc", "c_proj"])
    bare, wearing = theirs(images), get_peft_model(theirs, config).eval()
    randomise(wearing)
    save(wearing, tmp_path, "open_clip.model")
    expected = wearing(images)
    pool = AdapterPool.from_pretrained(tmp_path, backbone=backbone)
    with pool.folded(0) as worn:
        torch.testing.assert_close(worn.features(images), expected, rtol=1e-4, atol=1e-4)
    assert (expected - bare).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("wrapper", ["model.", "_orig_mod.", "base_model.model."])
def test_prefixes_of_wrappers_are_looked_through(tmp_path, wrapper):
    model, twin = save_adapter(tmp_path)
    images = torch.randn(2, 3, 32, 32)
    own = "base_model.model."
    edit_tensors(tmp_path, lambda ts: {key.replace(own, own + wrapper): tensor for key, tensor in ts.items()})
    pool = AdapterPool.from_pretrained(tmp_path, backbone=Backbone(twin, tiny_processor(), "twin"))
    torch.testing.assert_close(logits(pool, images), model(pixel_values=images).logits, rtol=1e-4, atol=1e-4)


BESIDE = {
    "layers": {"modules_to_save": ["classifier", "layernorm", "patch_embeddings", "fc2"]},
    "embeddings": {"modules_to_save": ["classifier", "vit.embeddings"]},
    "bias of its layers": {"bias": "lora_only", "modules_to_save": ["classifier"]},
    "all biases": {"bias": "all", "modules_to_save": ["classifier"]},
}


@torch.no_grad()
@pytest.mark.parametrize("beside", BESIDE)
def test_what_a_lora_saves_beside_its_matrices_is_not_lost(tmp_path, beside):
    config = LoraConfig(r=4, target_modules=ATTENTION, **BESIDE[beside])
    model, twin = save_adapter(tmp_path, config)
    images = torch.randn(2, 3, 32, 32)
    pool = AdapterPool.from_pretrained(tmp_path, backbone=Backbone(twin, tiny_processor(), "twin"))
    assert pool[0].vector_deltas
    torch.testing.assert_close(logits(pool, images), model(pixel_values=images).logits, rtol=1e-4, atol=1e-4)


@pytest.fixture
def own_head(tmp_path):
    """The folder of a base model with a classifier of its own: 3 classes with names."""
    model = shake(tiny_classifier())
    model.config.id2label = {0: "cat", 1: "dog", 2: "fox"}
    model.save_pretrained(tmp_path / "base")
    tiny_processor().save_pretrained(tmp_path / "base")
    return tmp_path / "base", model


@torch.no_grad()
@pytest.mark.parametrize("rslora", [False, True])
def test_a_lora_on_the_classifier_of_the_base_has_its_head_and_names(own_head, tmp_path, rslora):
    base, model = own_head
    config = LoraConfig(r=4, lora_alpha=6, use_rslora=rslora, target_modules=[*ATTENTION, "classifier"])
    wearing, images = get_peft_model(model, config).eval(), torch.randn(2, 3, 32, 32)
    randomise(wearing)
    wearing.save_pretrained(tmp_path / "lora")
    pool = AdapterPool.from_pretrained(tmp_path / "lora", base_model=base, require_heads=True)
    assert pool.infos[0].labels == ("cat", "dog", "fox") == pool[0].info.labels
    torch.testing.assert_close(logits(pool, images), wearing(pixel_values=images).logits, rtol=1e-4, atol=1e-4)
    assert check_usable([pool.infos[0]], str(base))[0].usable
    bare = Backbone(headless_twin(tiny_classifier()), tiny_processor(), "bare")
    with pytest.raises(AdapterError, match="lora: has no classification head"):
        AdapterPool.from_pretrained(tmp_path / "lora", backbone=bare, require_heads=True)


@torch.no_grad()
def test_a_head_that_was_not_saved_is_the_bases_or_one_of_labelled_images(own_head, tmp_path, toy_data):
    base, model = own_head
    wearing, images = (
        get_peft_model(model, LoraConfig(r=4, target_modules=ATTENTION)).eval(),
        torch.randn(2, 3, 32, 32),
    )
    randomise(wearing)
    wearing.save_pretrained(tmp_path / "lora")
    with pytest.raises(AdapterError, match="lora: has no classification head.*--support"):
        AdapterPool.from_pretrained(tmp_path / "lora", base_model=base, require_heads=True)
    pool = AdapterPool.from_pretrained(tmp_path / "lora", base_model=base, class_names=["cat", "dog", "fox"])
    torch.testing.assert_close(logits(pool, images), wearing(pixel_values=images).logits, rtol=1e-4, atol=1e-4)
    fitted = AdapterPool.from_pretrained(tmp_path / "lora", base_model=base, support=toy_data, require_heads=True)
    assert fitted.infos[0].labels == tuple(toy_data.label_names) and len(fitted.infos[0].support) == 64
    scores = logits(fitted, fitted.backbone.normalize(toy_data.pixels))
    assert (scores.argmax(1) == toy_data.labels).float().mean() > 0.9
