"""Tiny models from configs, and real PEFT folders made with them."""

import json
from pathlib import Path

import torch
from peft import (
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    VeraConfig,
    get_peft_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch.nn.functional import linear
from transformers import ViTConfig, ViTForImageClassification, ViTModel


SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
#: The text half of a tiny CLIP or SigLIP.
TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 9}
TEXT |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
ATTENTION = ["q_proj", "v_proj"]
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
#: Paths of transformers 5 below a ViT layer -> paths of transformers 4.
OLD_VIT = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
OLD_DINOV2 = {new: old for new, old in OLD_VIT.items() if new.startswith("attention")}


HEADED = {"modules_to_save": ["classifier"]}
CONFIGS = {
    "lora": LoraConfig(r=4, lora_alpha=8, target_modules=ALL_LINEAR, **HEADED),
    "dora": LoraConfig(r=4, use_dora=True, target_modules=ATTENTION, **HEADED),
    "rslora": LoraConfig(r=4, use_rslora=True, target_modules=["fc1"], **HEADED),
    "pattern": LoraConfig(
        r=4,
        target_modules=ALL_LINEAR,
        rank_pattern={"q_proj": 2},
        alpha_pattern={r"layers\.1\.mlp\.fc1": 32},
        **HEADED,
    ),
    "one_layer": LoraConfig(r=4, target_modules=ATTENTION, layers_to_transform=[1], **HEADED),
    "loha": LoHaConfig(r=4, target_modules=ATTENTION, **HEADED),
    "lokr": LoKrConfig(r=4, target_modules=ATTENTION, **HEADED),
    "ia3": IA3Config(target_modules=["k_proj", "fc1"], feedforward_modules=["fc1"], **HEADED),
    "ln_tuning": LNTuningConfig(target_modules=["layernorm_before"], **HEADED),
    "vera": VeraConfig(r=4, target_modules=ATTENTION, **HEADED),
    "oft": OFTConfig(oft_block_size=4, r=0, target_modules=ATTENTION, **HEADED),
}


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Fill what trains (adapters, head) with numbers that matter: PEFT starts half of them at zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2 + 0.05


def tiny_classifier(seed: int = 0, num_labels: int = 3, **sizes) -> ViTForImageClassification:
    torch.manual_seed(seed)
    return ViTForImageClassification(ViTConfig(**(SIZES | sizes), num_labels=num_labels)).eval()


def headless_twin(classifier: ViTForImageClassification) -> ViTModel:
    """A `ViTModel` with the classifier's backbone weights."""
    model = ViTModel(classifier.config, add_pooling_layer=False).eval()
    model.load_state_dict(classifier.vit.state_dict())
    return model


def save_adapter(folder: Path, config=None, **sizes) -> tuple[torch.nn.Module, ViTModel]:
    """A randomised PEFT adapter with its head in `folder`; returns the PEFT model and a headless twin of its base."""
    classifier = tiny_classifier(**sizes)
    backbone = headless_twin(classifier)
    config = config or LoraConfig(r=4, lora_alpha=8, target_modules=ATTENTION, modules_to_save=["classifier"])
    model = get_peft_model(classifier, config).eval()
    randomise(model)
    model.save_pretrained(folder)
    return model, backbone


def edit_tensors(folder: Path, edit) -> None:
    """Rewrite the folder's tensors through `edit(dict) -> dict`."""
    path = folder / "adapter_model.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in edit(load_file(path)).items()}, path)


def edit_config(folder: Path, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def to_old_name(key: str, old=OLD_VIT, layers=("vit.layers.", "vit.encoder.layer.")) -> str:
    """A key of transformers 5 as transformers 4 wrote it."""
    key = key.replace(*layers)
    new = next((name for name in old if f".{name}." in f"{key}."), None)
    return key.replace(new, old[new]) if new else key


def make_old(folder: Path) -> None:
    """Turn a ViT adapter of transformers 5 into one of transformers 4."""
    edit_tensors(folder, lambda tensors: {to_old_name(key): tensor for key, tensor in tensors.items()})
    config = json.loads((folder / "adapter_config.json").read_text())
    leaves = {"q_proj": "query", "k_proj": "key", "v_proj": "value"}
    leaves |= {"fc1": "intermediate.dense", "fc2": "output.dense", "o_proj": "attention.output.dense"}
    edit_config(folder, target_modules=[leaves.get(name, name) for name in config["target_modules"]])


def logits_of(loaded, backbone, pixels):
    """(N, C) logits of the headless backbone that wears the loaded adapter."""
    wearing = get_peft_model(backbone, loaded.peft_config).eval()
    result = set_peft_model_state_dict(wearing, loaded.state_dict)
    assert not result.unexpected_keys
    features = wearing(pixel_values=pixels).last_hidden_state[:, 0]
    return linear(features, loaded.head_weight, loaded.head_bias)
