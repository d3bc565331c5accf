"""A base model's `config.json`, which anyone may have written: bounded before transformers or memory sees it.

Only settings that are named here, with their bounds, reach transformers. All others, such as an attention kernel, a
file name of weights or an attribute of Python's own, are left out; those that ask for code or quantized weights are
refused, for the model would not be what the file says.
"""

from __future__ import annotations

import math
import numbers
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.activations import ACT2CLS

from ..errors import AdapterError, first_line
from ..runtime.untrusted import parse_json
from ..runtime.untrusted_files import read_text
from .families import FAMILIES


CONFIG_FILE = "config.json"
#: Model types that hold a text encoder beside the image encoder; those of `FAMILIES` are an image encoder alone.
TWO_TOWER_TYPES = ("clip", "siglip")
MAX_PARAMETERS = 4 * 10**9
MAX_PATCHES = 2**14

_INTEGERS = {
    "hidden_size": (1, 2**14),
    "intermediate_size": (1, 2**16),
    "num_hidden_layers": (1, 1000),
    "num_attention_heads": (1, 1024),
    "mlp_ratio": (1, 64),
    "image_size": (1, 4096),
    "patch_size": (1, 1024),
    "num_channels": (3, 3),
    "num_register_tokens": (0, 1024),
    "encoder_stride": (1, 4096),
    "pooler_output_size": (1, 2**14),
    "projection_dim": (1, 2**14),
    "projection_size": (1, 2**14),
    "vocab_size": (1, 10**6),
    "max_position_embeddings": (1, 2**16),
    "pad_token_id": (0, 10**6),
    "bos_token_id": (0, 10**6),
    "eos_token_id": (0, 10**6),
}
_NUMBERS = {
    "layer_norm_eps": (0, 1),
    "hidden_dropout_prob": (0, 1),
    "attention_probs_dropout_prob": (0, 1),
    "attention_dropout": (0, 1),
    "drop_path_rate": (0, 1),
    "initializer_range": (0, 10),
    "initializer_factor": (0, 10),
    "layerscale_value": (-10, 10),
    "logit_scale_init_value": (-100, 100),
}
_FLAGS = ("qkv_bias", "use_swiglu_ffn", "use_mask_token", "vision_use_head")
_ACTIVATIONS = ("hidden_act", "pooler_act")
_SIDES = ("image_size", "patch_size")
# settings without which the weights mean something else, or that name code
_REFUSED = {
    "auto_map": "it names custom code (auto_map), which is never run",
    "quantization_config": "its weights are quantized (quantization_config); name the base model that they come from",
}


def read_base_settings(folder: Path, where: str) -> dict[str, Any]:
    """The parsed `config.json` of a base model whose type is known.

    Raises:
        AdapterError: it is missing or no plain JSON object, names code, is quantized, or is no image encoder's.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise AdapterError(f"{where}: the backbone cannot be loaded ({CONFIG_FILE} is missing).")
    try:
        settings = read_settings(path)
    except (OSError, ValueError) as error:
        raise AdapterError(f"{where}: {CONFIG_FILE}: {error}.") from error
    model_type = settings.get("model_type")
    if model_type not in (*FAMILIES, *TWO_TOWER_TYPES):
        known = ", ".join((*FAMILIES, *TWO_TOWER_TYPES))
        raise AdapterError(f"{where}: backbones of type {str(model_type)[:80]} are not supported ({known} are).")
    return settings


def read_settings(path: Path) -> dict[str, Any]:
    """The parsed file. Raises `ValueError` where it is no JSON object, names code, or is of quantized weights."""
    settings = parse_json(read_text(path))
    if not isinstance(settings, dict):
        raise ValueError(f"it must be a JSON object, got a {type(settings).__name__}")
    for key, reason in _REFUSED.items():
        if settings.get(key):
            raise ValueError(reason)
    return settings


def tower_config(settings: dict[str, Any], where: str) -> PreTrainedConfig:
    """The image encoder's configuration, of a model that holds a text encoder too that of its image tower.

    Raises:
        AdapterError: a setting is of the wrong type or beyond its bounds, or settings do not fit each other.
    """
    model_type = settings["model_type"]
    if model_type in TWO_TOWER_TYPES:
        return _built(f"{model_type}_vision_model", _part(settings, "vision_config", where), where)
    return _built(model_type, settings, where)


def whole_config(settings: dict[str, Any], where: str, **options: Any) -> PreTrainedConfig:
    """The configuration of the whole model, text encoder included. Raises `AdapterError` as [`tower_config`].

    Args:
        options: trusted settings that are added, such as `id2label`.
    """
    model_type = settings["model_type"]
    if model_type not in TWO_TOWER_TYPES:
        return _built(model_type, settings, where, **options)
    parts = {
        f"{part}_config": _built(f"{model_type}_{part}_model", _part(settings, f"{part}_config", where), where)
        for part in ("text", "vision")
    }
    return _built(model_type, settings, where, **parts, **options)


def num_parameters(config: PreTrainedConfig) -> int:
    """Numbers in the layers and embeddings: no more than the model will have."""
    if config.model_type in TWO_TOWER_TYPES:
        return num_parameters(config.text_config) + num_parameters(config.vision_config)
    hidden = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or hidden * config.mlp_ratio
    layers = config.num_hidden_layers * hidden * (4 * hidden + 2 * inner)
    if hasattr(config, "vocab_size"):
        return layers + hidden * (config.vocab_size + config.max_position_embeddings)
    return layers + hidden * (_patches(config) + 3 * config.patch_size**2)


def _built(model_type: str, settings: dict[str, Any], where: str, **options: Any) -> PreTrainedConfig:
    """A configuration of the settings that are known to be harmless."""
    kind = CONFIG_MAPPING[model_type]
    try:
        kept = {key: _checked(key, settings[key]) for key in settings if _is_used(kind, key, settings[key])}
        config = kind(**kept, **options)
        if model_type not in TWO_TOWER_TYPES:
            _check_encoder(config)
        if num_parameters(config) > MAX_PARAMETERS:
            raise ValueError(f"a model of at least {num_parameters(config)} parameters, more than {MAX_PARAMETERS}")
    except (ValueError, TypeError, StrictDataclassError) as error:  # the last: transformers' own checks
        raise AdapterError(f"{where}: {CONFIG_FILE}: {first_line(error.__cause__ or error).rstrip('.')}.") from error
    return config


def _part(settings: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    """One encoder's settings. Files of older transformers repeat some of them as `..._dict`, which then hold."""
    parts = [settings.get(name) or {} for name in (key, f"{key}_dict")]
    for part in parts:
        if not isinstance(part, dict):
            raise AdapterError(f"{where}: {CONFIG_FILE}: {key} must be a JSON object, got a {type(part).__name__}.")
    return parts[0] | parts[1]


def _is_used(kind: type, key: str, value: Any) -> bool:
    known = key in _INTEGERS or key in _NUMBERS or key in _FLAGS or key in _ACTIVATIONS
    return known and value is not None and key in kind.__dataclass_fields__  # type: ignore[attr-defined]


def _checked(key: str, value: Any) -> Any:
    """The value, a side of a square as one number. Raises `ValueError` where it is out of bounds."""
    if key in _SIDES and isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
        value = value[0]
    if key in _INTEGERS and (type(value) is not int or not _within(value, _INTEGERS[key])):
        what = "one whole number, as images are square," if key in _SIDES else "a whole number"
        raise ValueError(f"{key} must be {what} from {_INTEGERS[key][0]} to {_INTEGERS[key][1]}, got {_short(value)}")
    if key in _NUMBERS:
        if type(value) not in (int, float) or not _within(value, _NUMBERS[key]):
            raise ValueError(
                f"{key} must be a number from {_NUMBERS[key][0]} to {_NUMBERS[key][1]}, got {_short(value)}"
            )
        value = float(value)
    if key in _FLAGS and type(value) is not bool:
        raise ValueError(f"{key} must be true or false, got {_short(value)}")
    if key in _ACTIVATIONS and (not isinstance(value, str) or value not in ACT2CLS):
        raise ValueError(f"transformers knows no activation {_short(value)} ({key})")
    return value


def check_processor(processor: Any, where: str) -> None:
    """Raises `AdapterError` where an image processor normalises or resizes by numbers that no image survives."""
    for name, least in (("image_mean", -1e6), ("image_std", 1e-6)):
        values = getattr(processor, name, None)
        if not isinstance(values, (list, tuple)) or len(values) != 3 or not all(_is_real(v, least) for v in values):
            what = "positive numbers" if least > 0 else "numbers"
            raise AdapterError(f"{where}: image processor: {name} must be three {what}, got {str(values)[:80]}.")
    resample = getattr(processor, "resample", None)
    if isinstance(resample, bool) or not isinstance(resample, int) or not 0 <= resample <= 5:
        raise AdapterError(f"{where}: image processor: resample must be a filter of PIL's, 0 to 5, got {resample!r}.")
    if processor.do_rescale and not _is_real(processor.rescale_factor, 1e-6):
        raise AdapterError(
            f"{where}: image processor: rescale_factor must be positive, got {str(processor.rescale_factor)[:80]}."
        )
    for name in ("size", "crop_size"):
        for side in ("height", "width", "shortest_edge", "longest_edge"):
            length, most = getattr(getattr(processor, name, None), side, None), _INTEGERS["image_size"][1]
            if length is not None and (type(length) is not int or not 1 <= length <= most):
                raise AdapterError(
                    f"{where}: image processor: {name}: {side} must be a whole number from 1 to {most}, got "
                    f"{str(length)[:80]}."
                )
    _try_processor(processor, where)


def _try_processor(processor: Any, where: str) -> None:
    """Settings that are sound alone may still fail together, which one small image shows."""
    try:
        values = processor(images=[Image.new("RGB", (5, 4))], return_tensors="np")["pixel_values"]
        sound = values.ndim == 4 and values.shape[:2] == (1, 3) and bool(np.isfinite(values).all())
    except Exception as error:  # noqa: BLE001 - transformers raises anything for settings of a stranger
        reason = first_line(error).rstrip(".")
        raise AdapterError(f"{where}: image processor: it fails on an image ({reason}).") from error
    if not sound:
        raise AdapterError(f"{where}: image processor: of an image it makes {values.shape}, or what is not finite.")


def _is_real(value: Any, least: float) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and _within(float(value), (least, 1e6))


def _within(value: float, bounds: tuple[float, float]) -> bool:
    return math.isfinite(value) and bounds[0] <= value <= bounds[1]


def _check_encoder(config: PreTrainedConfig) -> None:
    """Raises `ValueError` where settings that are sound alone do not fit each other."""
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"hidden_size {config.hidden_size} cannot be divided among num_attention_heads "
            f"{config.num_attention_heads}"
        )
    if not hasattr(config, "image_size"):
        return
    if config.image_size < config.patch_size:
        raise ValueError(f"image_size {config.image_size} is smaller than patch_size {config.patch_size}")
    if _patches(config) > MAX_PATCHES:
        raise ValueError(
            f"image_size {config.image_size} and patch_size {config.patch_size} give {_patches(config)} patches, "
            f"more than {MAX_PATCHES}"
        )


def _patches(config: PreTrainedConfig) -> int:
    return (config.image_size // config.patch_size) ** 2


def _short(value: Any) -> str:
    return f"a {type(value).__name__}" if isinstance(value, (list, dict)) else repr(value)[:80]
