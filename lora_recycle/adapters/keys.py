"""Names in an adapter file, turned into names of the live backbone. The only half-private imports are here.

transformers 5 renamed modules of its vision transformers (`encoder.layer.0.attention.attention.query` became
`layers.0.attention.q_proj`) and converts *base* checkpoints on load; PEFT does not find those renames for adapters.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, cast

from peft import LoraConfig, PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from ..errors import AdapterError
from ..runtime.untrusted import check_pattern
from .other_names import PEFT_PREFIX as PEFT_PREFIX
from .other_names import WRAPPERS


_PATTERNS = {"rank_pattern", "alpha_pattern"}
# parts of a config that change the shared base model, or count its layers differently
_CHANGES_BASE = ("layer_replication", "target_parameters", "trainable_token_indices", "alora_invocation_tokens")
_CHANGING_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")
# choices of modules that the explicit list of targets replaces, and a setting that makes PEFT import a module by name
_CHOOSE_MODULES = ("exclude_modules", "layers_to_transform", "layers_pattern")
_DROPPED = (*_CHOOSE_MODULES, "modules_to_save", "megatron_config", "auto_mapping", "runtime_config")
# what a MonteCLoRA draws its noise with in training; in eval mode it is the plain LoRA that it also holds
_TRAINING_ONLY = ("monteclora_config", ".lora_monteclora_sampler.")


def to_backbone_keys(keys: Iterable[str], model: PreTrainedModel) -> tuple[dict[str, str], bool]:
    """Map the keys of an adapter file to keys for the headless live model.

    Args:
        keys (`Iterable[str]`):
            PEFT state-dict keys without the classifier's, saved from the bare model or from a class around it, e.g.
            `base_model.model.vit.encoder.layer.0.attention.attention.query.lora_A.weight`.
        model (`PreTrainedModel`):
            The headless backbone, e.g. a `ViTModel`. Not changed.

    Returns:
        `tuple[dict[str, str], bool]`: key in the file -> key for `model`, e.g.
        `base_model.model.layers.0.attention.q_proj.lora_A.weight`, and whether names of transformers 4 were converted.

    Raises:
        AdapterError: a key belongs to no module of `model`, or two keys come out the same.
    """
    leaves, renamings, parameters = leaf_modules(model), _renamings(model), {n for n, _ in model.named_parameters()}
    renamed, converted = {}, False
    for key in keys:
        if not key.startswith(PEFT_PREFIX):
            renamed[key] = key  # parameters that all layers share, such as `base_model.vera_A`
            continue
        path, was_converted = _live_path(key.removeprefix(PEFT_PREFIX), leaves | parameters, renamings)
        if path is None:
            reason = f"{type(model).__name__} has no such module, under today's or older names"
            raise AdapterError(f"{key}: {reason}. Was the adapter made for another base model?")
        renamed[key], converted = PEFT_PREFIX + path, converted or was_converted
    double, times = max(Counter(renamed.values()).items(), key=lambda item: item[1], default=("", 0))
    if times > 1:
        raise AdapterError(f"{double}: the file holds this tensor twice, under an old and a new name.")
    return renamed, converted


def without_training_only(config: dict[str, Any], keys: Iterable[str]) -> list[str]:
    """The keys without those of tensors that the adapter uses in training alone."""
    setting, part = _TRAINING_ONLY
    return [key for key in keys if not (config.get(setting) and part in key)]


def leaf_modules(model: nn.Module) -> set[str]:
    """Paths of the modules that an adapter can wrap: parameters of their own and no sub-modules."""
    return {
        name
        for name, module in model.named_modules()
        if name and next(module.children(), None) is None and next(module.parameters(recurse=False), None) is not None
    }


def module_of(key: str, leaves: set[str]) -> str | None:
    """The longest path in `leaves` that `key` (with or without PEFT's prefix) goes through, or None."""
    parts = key.removeprefix(PEFT_PREFIX).split(".")
    # the last part is a parameter's own name, never a module's
    paths = (".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1))
    return next((path for path in paths if path in leaves), None)


def rebuild_config(config: dict[str, Any], names: dict[str, str], model: nn.Module) -> PeftConfig:
    """The adapter's config with the targets that its file has on `model`, not those that it lists.

    Args:
        config (`dict`): parsed `adapter_config.json`.
        names (`dict[str, str]`): what `to_backbone_keys` gave for the file.
        model (`nn.Module`): the headless backbone. Not changed.

    Raises:
        AdapterError: the config is not valid for its type, or the adapter would change the base model's own weights.
    """
    _check_keeps_base(config)
    sources = _source_paths(names, model)
    kind = PEFT_TYPE_TO_CONFIG_MAPPING[config["peft_type"]]
    known = {f.name for f in dataclasses.fields(kind) if f.init}
    unknown = sorted(key for key in config if key not in known and config[key])
    if unknown:
        raise AdapterError(f"the config sets {', '.join(unknown)}, which this PEFT does not know. Upgrade peft.")
    dropped = (*_DROPPED, _TRAINING_ONLY[0])
    values = {key: value for key, value in config.items() if key in known and key not in dropped}
    values |= {"task_type": None, "inference_mode": True}
    values |= {"bias": "none"} if "bias" in values else {}  # what biases became is read as weights of the base
    try:
        values["target_modules"] = sorted(sources) or _chosen_modules(config, model)
        for field in _PATTERNS & values.keys():
            values[field] = _live_pattern(values[field] or {}, sources, names)
        if values.get("feedforward_modules"):
            values["feedforward_modules"] = _live_feedforward(values["feedforward_modules"], sources)
        if isinstance(values.get("init_lora_weights"), str):
            values["init_lora_weights"] = True  # the file's tensors replace what the initialisation leaves
        return kind(**values)
    except Exception as error:  # noqa: BLE001 - PEFT's checks of settings that anyone may have written
        raise AdapterError(f"the config is not valid for {config['peft_type']}: {error}") from error


def _check_keeps_base(config: dict[str, Any]) -> None:
    changing = [field for field in _CHANGES_BASE if config.get(field)]
    if config.get("n_tasks", 1) != 1:
        raise AdapterError(
            f"the adapter holds {config['n_tasks']} tasks (n_tasks) and nothing says which one to take."
        )
    if str(config.get("init_lora_weights")).lower().startswith(_CHANGING_STARTS):
        changing.append("init_lora_weights")
    if changing:
        raise AdapterError(
            f"the config sets {changing[0]}={config[changing[0]]!r}, which changes the base model that adapters "
            "share. Convert the adapter to plain LoRA, or leave it out."
        )


def _source_paths(names: dict[str, str], model: nn.Module) -> dict[str, str]:
    """Live module path -> the path that the file gave it, for each module that owns tensors of the adapter."""
    leaves, sources = leaf_modules(model), {}
    for key, renamed in names.items():
        if renamed.startswith(PEFT_PREFIX):
            path = cast(str, module_of(renamed, leaves))  # there is one: these keys are live
            parameter = renamed.removeprefix(PEFT_PREFIX + path)
            sources[path] = key.removeprefix(PEFT_PREFIX).removesuffix(parameter)
    return sources


def _chosen_modules(config: dict[str, Any], model: nn.Module) -> list[str]:
    """Live paths that the config's own choice means, for types whose file holds only tensors that all layers share.

    Nothing in such a file says which layers were changed, so the choice must be one that reads the same on `model`.
    """
    targets, saved_whole = config.get("target_modules"), config.get("modules_to_save") or []
    paths = sorted(leaf_modules(model))
    names = {path: [path, *(prefix + path for prefix in _class_prefixes(model))] for path in paths}
    known = [f".{name}" for forms in names.values() for name in forms]
    lost = (
        [t for t in targets if not any(name.endswith(f".{t}") for name in known)] if isinstance(targets, list) else []
    )
    made_for = str((config.get("auto_mapping") or {}).get("base_model_class"))
    whole_class = made_for.endswith(("ForImageClassification", "VisionModel", type(model).__name__))
    if targets == "all-linear" or not whole_class or set(lost) - set(saved_whole):
        raise ValueError(
            f"its tensors are shared by all layers, and target_modules of a {made_for} mean other layers here "
            f"({', '.join(lost) or targets}); save the adapter with its indices, or with other target_modules"
        )
    chosen: dict[str, Any] = {field: config.get(field) for field in _CHOOSE_MODULES} | {"target_modules": targets}
    for pattern in (value for value in chosen.values() if isinstance(value, str)):
        check_pattern(pattern)
    choice = LoraConfig(**chosen)  # how types choose modules is the same for all of them
    return [path for path in paths if any(check_target_module_exists(choice, name) for name in names[path])]


def _live_pattern(pattern: dict[str, Any], sources: dict[str, str], names: dict[str, str]) -> dict[str, Any]:
    """Ranks or alphas for the modules that `pattern` meant, under their exact live paths.

    LoRA gives a number for each pattern, AdaLoRA a mask for each `lora_E`, which ranks are left.
    """
    if any(isinstance(value, list) for value in pattern.values()):
        return {names.get(PEFT_PREFIX + key, key).removeprefix(PEFT_PREFIX): mask for key, mask in pattern.items()}
    checked = {check_pattern(key): value for key, value in pattern.items()}
    live: dict[str, Any] = {}
    for path, source in sources.items():
        value = next((v for key, v in checked.items() if re.fullmatch(rf"(.*\.)?({key})", source)), None)
        live |= {} if value is None else {path: value}
    return live


def _live_feedforward(names: str | list[str], sources: dict[str, str]) -> list[str]:
    if isinstance(names, str):
        check_pattern(names)
        return [path for path, source in sources.items() if re.fullmatch(names, source)]
    return [path for path, source in sources.items() if any(f".{source}".endswith(f".{name}") for name in names)]


def _live_path(path: str, live: set[str], renamings: list[WeightRenaming]) -> tuple[str | None, bool]:
    """The first of: the path as it is, without what wraps the model, under today's names; None where all fail.

    Args:
        live: paths of modules that an adapter can wrap, and of parameters.
    """
    parts = path.split(".")
    wrappers = next((i for i, part in enumerate(parts) if part not in WRAPPERS), len(parts) - 1)
    stripped = [".".join(parts[first:]) for first in range(wrappers + 1)]
    for candidate in stripped:
        if candidate in live or module_of(candidate, live) is not None:
            return candidate, False
    for candidate in stripped:
        modern, _ = rename_source_key(candidate, renamings, [])
        if modern in live or module_of(modern, live) is not None:
            return modern, True
    return None, False


def _renamings(model: PreTrainedModel) -> list[WeightRenaming]:
    # converters split or merge tensors, which is not defined for a low-rank factor: only plain renames count
    return [r for r in get_model_conversion_mapping(model, add_legacy=False) if isinstance(r, WeightRenaming)]


def _class_prefixes(model: nn.Module) -> list[str]:
    """What a class around `model` puts before its module paths: `vit.` in `ViTForImageClassification`."""
    names = (getattr(model, "base_model_prefix", ""), "vision_model")
    return [f"{name}." for name in dict.fromkeys(names) if name]
