"""Tiny CLIP and SigLIP models, saved whole with a tokenizer as their repos are, and LoRAs of their image tower."""

import string
from pathlib import Path

import torch
from helpers_tiny import SIZES, shake, tiny_processor
from peft import LoraConfig, get_peft_model
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, PreTrainedModel, SiglipConfig, SiglipModel


LETTERS = string.ascii_lowercase + string.digits + "."
VOCABULARY = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
TEXT = SIZES | {"vocab_size": len(VOCABULARY), "max_position_embeddings": 40}
TEXT |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}


def tiny_tokenizer() -> CLIPTokenizer:
    """Letters are its words; texts are 40 tokens at most."""
    return CLIPTokenizer({word: i for i, word in enumerate(VOCABULARY)}, [], model_max_length=40)


def save_tiny_pair(folder: Path, family: str = "clip") -> PreTrainedModel:
    """A random `CLIPModel` (projected to 24 numbers) or `SiglipModel` in `folder`, as their repos have them."""
    torch.manual_seed(0)
    if family == "clip":
        model = CLIPModel(CLIPConfig(vision_config=SIZES, text_config=TEXT, projection_dim=24))
    else:
        model = SiglipModel(SiglipConfig(vision_config=SIZES, text_config=TEXT | {"projection_size": 32}))
    shake(model)
    model.save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


def wear_lora(model: PreTrainedModel, folder: Path, base: str, seed: int = 0, rank: int = 3):
    """Save a random LoRA of the image tower, without a head, in `folder`; returns the model that wears it."""
    config = LoraConfig(r=rank, target_modules=r"vision_model\..*(q_proj|v_proj|fc1)")
    wearing = get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in wearing.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    wearing.peft_config["default"].base_model_name_or_path = base
    wearing.save_pretrained(folder)
    return wearing


#: Of the file that `paper_tensors` makes.
RANK, CLASSES = 3, 5


def paper_tensors(layers=2, hidden=32, projection=24, scale=0.2):
    """What the code saves for a tiny CLIP: q and v of each layer in turn, and the head's weight."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for i in range(2 * layers):
        tensors[f"w_a_{i:03d}"] = scale * torch.randn(RANK, hidden, generator=generator)
        tensors[f"w_b_{i:03d}"] = scale * torch.randn(hidden, RANK, generator=generator)
    tensors[f"fc_{projection}in_{CLASSES}out"] = torch.randn(CLASSES, projection, generator=generator)
    return tensors
