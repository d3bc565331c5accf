"""The files of an adapter repo, fetched and checked before any tensor is read. Nothing here is ever executed."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peft.config import PromptLearningConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors import SafetensorError, safe_open

from ..errors import AdapterError
from ..hub.card_files import read_card
from ..hub.download import fetch
from ..hub.repo_files import (
    CARD_FILE,
    CODES_FILE,
    CONFIG_FILE,
    MAX_CLASSES,
    MAX_PICTURE_BYTES,
    PICTURE_FILE,
    SIDECAR_FILE,
    TASK_FILE,
    WEIGHTS_FILE,
    checked_file,
    optional_file,
)
from ..runtime.files import file_sha256
from ..runtime.untrusted import check_settings, parse_json
from ..runtime.untrusted_files import MAX_TEXT_BYTES, read_text
from ..runtime.untrusted_tensors import MAX_FILE_BYTES, read_safetensors_header
from .quantization import read_coded_header


#: All that is ever downloaded of an adapter's repo, and the most bytes that each may have.
REPO_FILES = {
    CONFIG_FILE: MAX_TEXT_BYTES,
    WEIGHTS_FILE: MAX_FILE_BYTES,
    CODES_FILE: MAX_FILE_BYTES,
    CARD_FILE: MAX_TEXT_BYTES,
    SIDECAR_FILE: MAX_TEXT_BYTES,
    PICTURE_FILE: MAX_PICTURE_BYTES,
}

#: Types that steer a text decoder (its prompt, its token embeddings, its blocks), beside the prompt learning ones.
_TEXT_ONLY = ("ADAPTION_PROMPT", "SHADOW", "TRAINABLE_TOKENS", "XLORA")

# the classifier as PEFT stores it, with and without the wrapper of `modules_to_save`
HEAD = re.compile(
    r"base_model\.model\.(cls_classifier|classifier|head|score|fc|pooled_classifier)(\.modules_to_save(\.\w+)?)?\.(weight|bias)"
)
#: A head on the pooled image ([`Backbone.pool_features`]), not on what the family's own classifier reads.
POOLED_HEAD = "base_model.model.pooled_classifier.weight"
# names that only transformers 4, and only 5, gave to modules
_GENERATION_4 = re.compile(
    r"\.(vit|deit)\.encoder\.layer\.|attention\.attention\.|attention\.output\.dense|intermediate\.dense"
    r"|\d\.output\.dense|\.weights_(in|out)\."
)
_GENERATION_5 = re.compile(r"\.model\.((vit|deit)\.)?layers\.|\.model\.encoder\.layers\.|\.attention\.[qkvo]_proj\.")
# image towers that transformers 4 alone kept below `vision_model.`; other classes of CLIP and SigLIP still do
_BARE_TOWERS = ("CLIPVisionModel", "SiglipVisionModel")


def download(
    repo: str,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | Path | None,
    local_files_only: bool,
    force_download: bool = False,
) -> Path:
    """Folder with the adapter files of one commit, whose SHA is its name. See [`fetch`]."""
    return fetch(repo, REPO_FILES, revision, token, cache_dir, local_files_only, force_download)


def read_config(folder: Path, where: str) -> dict[str, Any]:
    """The parsed `adapter_config.json`.

    Raises:
        AdapterError: it is no plain JSON object of an adapter type that can wrap an image encoder, or it names code,
            or sizes that are absurd.
    """
    path = checked_file(folder, CONFIG_FILE, where)
    try:
        config = parse_json(read_text(path))
    except (ValueError, OSError) as error:
        raise AdapterError(f"{where}: {CONFIG_FILE} is not valid JSON ({error}).") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{where}: {CONFIG_FILE} must be a JSON object, got a {type(config).__name__}.")
    _check_type(config.get("peft_type"), f"{where}: {CONFIG_FILE}")
    try:
        check_settings(config)
    except ValueError as error:
        raise AdapterError(f"{where}: {CONFIG_FILE}: {error}.") from error
    return config


def _check_type(peft_type: Any, where: str) -> None:
    kinds = {kind.value: config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if not isinstance(peft_type, str) or peft_type not in kinds:
        raise AdapterError(
            f"{where} has peft_type {peft_type!r}, which this PEFT does not know. "
            "Upgrade peft, or check that the folder is an adapter."
        )
    if peft_type in _TEXT_ONLY or issubclass(kinds[peft_type], PromptLearningConfig):
        raise AdapterError(f"{where}: adapters of type {peft_type} steer a text model, not an image encoder.")


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of the files of a meta-LoRA that only belong together as they were saved: see `check_checksums`.

    Of the config without the base model's name, which people correct by hand.
    """
    names = [name for name in (weights_file(folder), TASK_FILE) if (folder / name).exists()]
    found = {name: file_sha256(folder / name) for name in names}
    return {**found, CONFIG_FILE: _config_sha256(parse_json(read_text(folder / CONFIG_FILE)))}


def check_checksums(folder: Path, where: str, config: dict[str, Any], weights_sha256: str) -> None:
    """Make sure that config and weights are those that the sidecar, if there is one, was saved with.

    A sidecar of an earlier version names no checksums. The task is looked at where it is read: `check_task`.

    Raises:
        AdapterError: they are not, or the sidecar is damaged.
    """
    stated = read_sidecar_json(folder, where).get("checksums")
    if stated is not None:
        compare_checksums(stated, folder, where, config, weights_sha256)


def compare_checksums(stated: Any, folder: Path, where: str, config: dict[str, Any], weights_sha256: str) -> None:
    """Raise `AdapterError` where config and weights of a folder are not those of the `stated` checksums."""
    for name, digits in ((CONFIG_FILE, _config_sha256(config)), (weights_file(folder), weights_sha256)):
        _compare(stated, name, digits, where)


def check_task(folder: Path, where: str, settings: dict[str, Any]) -> Path | None:
    """The fitted task's file, None where there is none.

    Raises:
        AdapterError: it is a link out of the folder, or not what the sidecar with these `settings` was saved with.
    """
    path, stated = optional_file(folder, TASK_FILE, where), settings.get("checksums")
    if stated is not None:
        _compare(stated, TASK_FILE, None if path is None else file_sha256(path), where)
    return path


def _compare(stated: Any, name: str, digits: str | None, where: str) -> None:
    if not isinstance(stated, dict) or stated.get(name) != digits:
        raise AdapterError(
            f"{where}: {name} is not the one that {SIDECAR_FILE} was saved with: saving was cut short, or a file was "
            f"changed since. Save the model again; where you changed it, take `checksums` out of {SIDECAR_FILE}."
        )


def _config_sha256(config: dict[str, Any]) -> str:
    kept = {key: value for key, value in config.items() if key not in ("base_model_name_or_path", "revision")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def read_sidecar_json(folder: Path, where: str) -> dict[str, Any]:
    """What the sidecar holds, unchecked, empty where there is none. Raises `AdapterError` where it is damaged."""
    path = optional_file(folder, SIDECAR_FILE, where)
    try:
        settings = {} if path is None else parse_json(read_text(path))
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"{where}: {SIDECAR_FILE}: the sidecar is damaged ({error}). Delete it to use the defaults."
        ) from error
    if not isinstance(settings, dict):
        raise AdapterError(f"{where}: {SIDECAR_FILE}: the sidecar must hold a JSON object.")
    return settings


def weights_file(folder: Path) -> str:
    """Name of the file that holds the adapter's tensors: the plain one, or codes where that alone is there."""
    coded = (folder / CODES_FILE).exists() and not (folder / WEIGHTS_FILE).exists()
    return CODES_FILE if coded else WEIGHTS_FILE


def read_header(folder: Path, where: str) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor in `adapter_model.safetensors`, or of those that coded ones stand for, from the header.

    Raises:
        AdapterError: the file is missing, no regular file, only there as `.bin`, damaged, empty or of absurd size.
    """
    if weights_file(folder) == CODES_FILE:
        return read_codes(folder, where)[1]
    if not (folder / WEIGHTS_FILE).exists() and (folder / "adapter_model.bin").exists():
        raise AdapterError(
            f"{where}: only adapter_model.bin is there, and unpickling it could run any code. Convert it to "
            f"{WEIGHTS_FILE} where you trust it (PeftModel.save_pretrained does)."
        )
    return read_shapes(checked_file(folder, WEIGHTS_FILE, where), f"{where}: {WEIGHTS_FILE}")


def read_codes(folder: Path, where: str) -> tuple[int, dict[str, tuple[int, ...]]]:
    """Bits for a weight and tensor shapes of `adapter_codes.safetensors`. Raises `AdapterError` as `read_header`."""
    path = checked_file(folder, CODES_FILE, where)
    try:
        with safe_open(path, framework="pt"):
            return read_coded_header(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(
            f"{where}: {CODES_FILE} is truncated or damaged, or unsafe: {error}. Fetch it again."
        ) from error


def read_shapes(path: Path, where: str) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of a safetensors file, from its header. Raises `AdapterError` where it is no good."""
    try:
        shapes = read_safetensors_header(path).bounded_shapes()
        # safe_open compares the tensors' places with each other and with the file's length
        with safe_open(path, framework="pt"):
            return shapes
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(f"{where} is truncated or damaged, or unsafe: {error}. Fetch it again.") from error


def head_classes(shapes: dict[str, tuple[int, ...]], where: str) -> int | None:
    """Rows of the head. Raises `AdapterError` where its shapes are none of a linear layer's (C, D) and (C,)."""
    heads = {key: shapes[key] for key in shapes if HEAD.fullmatch(key)}
    if not heads:
        return None
    weights = [key for key in heads if key.endswith(".weight")]
    biases = [key for key in heads if key.endswith(".bias")]
    if len(weights) != 1 or len(biases) > 1:
        raise AdapterError(f"{where}: {WEIGHTS_FILE}: expected one head, found {', '.join(sorted(heads))}.")
    shape = heads[weights[0]]
    if len(shape) != 2 or not 1 <= shape[0] <= MAX_CLASSES:
        raise AdapterError(
            f"{where}: {WEIGHTS_FILE}: {weights[0]} must be (classes, features) with 1 to {MAX_CLASSES} classes, "
            f"got {shape}."
        )
    if biases and heads[biases[0]] != shape[:1]:
        raise AdapterError(
            f"{where}: {WEIGHTS_FILE}: {biases[0]} must be {shape[:1]} like the weight, got {heads[biases[0]]}."
        )
    return shape[0]


def target_names(config: dict[str, Any], keys: Iterable[str]) -> tuple[str, ...]:
    """Sorted leaf names of the config's targets, e.g. `("fc1", "q_proj")`."""
    targets = config.get("target_modules") or []
    if not isinstance(targets, list):  # a pattern: look at what it matched
        targets = {key.split(".lora_")[0] for key in keys if ".lora_" in key} or [targets]
    return tuple(sorted({str(target).rsplit(".", 1)[-1] for target in targets}))


def guess_generation(config: dict[str, Any], keys: Iterable[str]) -> int | None:
    """The major version of transformers, 4 or 5, that alone gave one of these names; None where both did."""
    keys = [key for key in keys if not HEAD.fullmatch(key)]
    if any(_GENERATION_4.search(key) for key in keys):
        return 4
    if any(_GENERATION_5.search(key) for key in keys):
        return 5
    made_for = (config.get("auto_mapping") or {}).get("base_model_class")
    below = any(key.startswith("base_model.model.vision_model.") for key in keys)
    return 4 if below and made_for in _BARE_TOWERS else None


def read_labels(folder: Path, where: str, num_classes: int | None) -> tuple[str, ...] | None:
    """Class names from `id2label` or `labels` in the card's front matter.

    None where there is no card, its YAML is broken, or it does not name exactly `num_classes` classes; for an adapter
    without a head any number of different names will do. Labels are a comfort, and a bad card does not make a bad
    adapter.
    """
    path = optional_file(folder, CARD_FILE, where)
    if path is None:
        return None
    try:
        labels = _label_list(read_card(path).metadata)
    except (OSError, KeyError, TypeError, ValueError):
        return None
    if not labels or len(labels) > MAX_CLASSES:
        return None
    fits = len(set(labels)) == len(labels) if num_classes is None else len(labels) == num_classes
    return tuple(labels) if fits else None


def _label_list(metadata: dict[str, Any]) -> list[str] | None:
    id2label, labels = metadata.get("id2label"), metadata.get("labels")
    if isinstance(id2label, dict):
        names = {int(index): name for index, name in id2label.items()}
        labels = [names[index] for index in range(len(names))]  # a gap is a KeyError: no labels
    # nested lists are no names, and aliases in YAML can make a few lines of them endless
    if isinstance(labels, list) and all(isinstance(name, (str, int, float)) for name in labels):
        return [str(name) for name in labels]
    return None
