"""Absurd and damaged base models by the thousand: each loads and answers with finite numbers, or is refused.

    PYTHONPATH=tests python tests/backbones/test_fuzz_base.py --inputs 10000

Inputs follow from the seed and their number; a failure names both, so that `--seed S --first N --inputs 1` repeats it.
"""

import argparse
import json
import logging
import random
import tempfile
import time
import warnings
from pathlib import Path

import pytest
import torch
from helpers_clip import TEXT
from helpers_tiny import SIZES, random_pixels, shake, tiny_processor
from safetensors import SafetensorError
from safetensors.torch import load, save
from transformers import (
    CLIPConfig,
    CLIPModel,
    DeiTConfig,
    DeiTModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from lora_recycle.backbones.backbone import Backbone, check_embeddings
from lora_recycle.errors import LoRARecycleError
from lora_recycle.modeling.preprocessing import to_pixel_values


CONFIG, WEIGHTS, PROCESSOR = "config.json", "model.safetensors", "preprocessor_config.json"
ONE = SIZES | {"num_hidden_layers": 1}
MODELS = {
    "vit": lambda: ViTModel(ViTConfig(**ONE)),
    "deit": lambda: DeiTModel(DeiTConfig(**ONE)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**ONE)),
    "registers": lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**ONE)),
    "clip": lambda: CLIPModel(CLIPConfig(vision_config=ONE, text_config=TEXT, projection_dim=24)),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**ONE)),
}
#: Values that code trips over.
NASTY = (None, True, False, 0, 1, -1, 2, 3, 7, 31, 64, 2**31, 2**63, 10**30, 0.0, -0.5, 0.5, 1.0, 1e-300, 1e308)
NASTY += ("", "x", "32", "gelu", "prelu", "xielu", "someone/kernel", "../..", "\u0000", "a" * 5000, "\ud83d\ude00")
NASTY += ([], {}, [[]], [None], [32, 32], [32, 64], [0, 0, 0], [0.5, 0.5, 0.5], [1e30] * 3, {"a": {}}, {"": 0})
KEYS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size", "patch_size"),
    *("num_channels", "hidden_act", "layer_norm_eps", "qkv_bias", "mlp_ratio", "num_register_tokens", "num_labels"),
    *("vision_config", "text_config", "vision_config_dict", "text_config_dict", "model_type", "id2label", "label2id"),
    *("attn_implementation", "_attn_implementation", "quantization_config", "auto_map", "transformers_weights"),
    *("fusion_config", "distributed_config", "per_layer_config", "rope_scaling", "pruned_heads", "dtype"),
    *("torch_dtype", "chunk_size_feed_forward", "output_attentions", "is_decoder", "tie_word_embeddings", "__class__"),
    *(
        "__dict__",
        "_name_or_path",
        "name_or_path",
        "architectures",
        "pooler_act",
        "pooler_output_size",
        "base_model_tp",
    ),
    *("vision_use_head", "use_swiglu_ffn", "use_mask_token", "layerscale_value", "drop_path_rate", "vocab_size"),
    *("size", "crop_size", "image_mean", "image_std", "rescale_factor", "resample", "do_resize", "do_normalize"),
    *("do_rescale", "do_center_crop", "do_pad", "do_convert_rgb", "image_processor_type", "feature_extractor_type"),
)
PICTURE = random_pixels(1)[0]


def prepare() -> dict[str, dict[str, bytes]]:
    """Sound base models, name to files in memory."""
    sound = {}
    with tempfile.TemporaryDirectory() as name:
        for family, make in MODELS.items():
            torch.manual_seed(0)
            folder = Path(name, family)
            shake(make()).save_pretrained(folder)
            tiny_processor().save_pretrained(folder)
            sound[family] = {file: (folder / file).read_bytes() for file in (CONFIG, WEIGHTS, PROCESSOR)}
    return sound


def spoil_settings(data: bytes, rng: random.Random) -> bytes:
    """One to three keys of a JSON object, or of an object in it, set, doubled, halved, renamed or taken out."""
    settings = json.loads(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        inner = [value for value in settings.values() if isinstance(value, dict) and value]
        place = rng.choice(inner) if inner and rng.random() < 0.6 else settings
        key = rng.choice(sorted(place)) if place and rng.random() < 0.5 else rng.choice(KEYS)
        value, how = place.get(key), rng.random()
        if how < 0.15:
            place.pop(key, None)
        elif how < 0.25 and key in place:
            place[key + rng.choice(("_", "x"))] = place.pop(key)
        elif how < 0.5 and isinstance(value, (int, float)):
            place[key] = rng.choice((value * 2, value // 2, value + 1, -value, value * 10**6))
        else:
            place[key] = rng.choice(NASTY)
    return json.dumps(settings).encode()


def spoil_tensors(data: bytes, rng: random.Random) -> bytes:
    """One tensor left out, renamed, reshaped, of another type, or its numbers huge, zero or NaN; or all of them."""
    tensors = load(data)
    key, how = rng.choice(sorted(tensors)), rng.randrange(8)
    if how == 0:
        del tensors[key]
    elif how == 1:
        tensors[f"{key}.{rng.choice(('x', 'weight'))}"] = tensors.pop(key)
    elif how == 2:
        tensors[key] = tensors[key].reshape(-1, 1).repeat(1, rng.choice((1, 2))).contiguous()
    elif how == 3:
        tensors[key] = tensors[key].to(rng.choice((torch.float16, torch.int64, torch.bool, torch.complex64)))
    elif how == 4:
        value = rng.choice((torch.nan, torch.inf, 1e38, -1e38, 1e20, 0.0))
        tensors[key] = torch.full_like(tensors[key], value)
    elif how == 5:
        tensors = {name: tensor * rng.choice((1e38, 1e10, 0.0)) for name, tensor in tensors.items()}
    else:
        tensors[key].view(-1)[rng.randrange(max(1, tensors[key].numel()))] = rng.choice((torch.nan, torch.inf, 3e38))
    return save(tensors, metadata={"format": "pt"})


def spoil_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flip, cut or insert within the first 2000 bytes, or cut off."""
    data, at = bytearray(data), rng.randrange(min(len(data), 2000))
    how = rng.randrange(4)
    if how == 0:
        data[at] = rng.randrange(256)
    elif how == 1:
        del data[at : at + rng.choice((1, 4, 100))]
    elif how == 2:
        data[at:at] = bytes(rng.randrange(256) for _ in range(rng.choice((1, 8))))
    else:
        del data[at:]
    return bytes(data)


def make_input(sound: dict[str, dict[str, bytes]], rng: random.Random) -> dict[str, bytes]:
    """The files of one input: those of a sound base model, one of them spoilt, sometimes two."""
    files = dict(sound[rng.choice(sorted(sound))])
    for _ in range(rng.choice((1, 1, 1, 2))):
        how = rng.random()
        try:
            if how < 0.55:
                files[CONFIG] = spoil_settings(files[CONFIG], rng)
            elif how < 0.7:
                files[PROCESSOR] = spoil_settings(files[PROCESSOR], rng)
            elif how < 0.85:
                files[WEIGHTS] = spoil_tensors(files[WEIGHTS], rng)
            elif how < 0.9:  # the configuration of one with the weights of another
                files[CONFIG] = sound[rng.choice(sorted(sound))][CONFIG]
            else:
                file = rng.choice((CONFIG, PROCESSOR, WEIGHTS))
                files[file] = spoil_bytes(files[file], rng)
        except (ValueError, SafetensorError):
            continue  # an earlier change left nothing to parse
    return files


@torch.inference_mode()
def attempt(folder: Path, files: dict[str, bytes]) -> str:
    """`answered`, or the message of the library's own error; every other exception goes through."""
    for file, data in files.items():
        (folder / file).write_bytes(data)
    try:
        backbone = Backbone.from_pretrained(folder)
        pixel_values = to_pixel_values(PICTURE[None], backbone)
        features = backbone.features(pixel_values)
        check_embeddings(features, pixel_values, backbone.name)
    except LoRARecycleError as error:
        assert folder.name in str(error), f"the error does not say where: {error}"
        return str(error)
    assert features.shape == (1, backbone.hidden_size) and features.norm().isfinite()
    return "answered"


def fuzz(folder: Path, inputs: int, seed: int = 0, first: int = 0) -> dict[str, float]:
    """Try `inputs` inputs. Returns how many answered, and the longest time that one took, in seconds."""
    sound = prepare()
    place = folder / "stranger"
    place.mkdir()
    for name, files in sound.items():
        said = attempt(place, files)
        assert said == "answered", f"{name}: {said}"
    answered, slowest = 0, 0.0
    for number in range(first, first + inputs):
        files, started = make_input(sound, random.Random(f"{seed}/{number}")), time.perf_counter()
        try:
            answered += attempt(place, files) == "answered"
        except Exception as error:
            raise AssertionError(f"input {number} of seed {seed}: {type(error).__name__}: {error}") from error
        slowest = max(slowest, time.perf_counter() - started)
    return {"inputs": inputs, "answered": answered, "slowest": round(slowest, 2)}


@pytest.mark.filterwarnings("ignore")
def test_base_models_answer_with_finite_numbers_or_are_refused(tmp_path):
    result = fuzz(tmp_path, 300)
    assert 20 < result["answered"] < 280  # both ways were walked


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as scratch:
        began = time.perf_counter()
        outcome = fuzz(Path(scratch), arguments.inputs, arguments.seed, arguments.first)
    print(outcome | {"seconds": round(time.perf_counter() - began)})
