"""Adapters of the Hub or of a folder: fetched at one commit, checked, described, and read for one live backbone."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import AdapterError
from ..storage import file_sha256
from ..wrapping import wrap
from .codes import CODES_FILE, decode
from .files import (
    CONFIG_FILE,
    HEAD,
    POOLED_HEAD,
    WEIGHTS_FILE,
    check_checksums,
    download,
    guess_generation,
    head_classes,
    read_codes,
    read_config,
    read_header,
    read_labels,
    target_names,
    weights_file,
)
from .keys import PEFT_PREFIX, rebuild_config, to_backbone_keys, without_training_only
from .licenses import read_license
from .untrusted import count


#: Configs whose PEFT model's names and shapes are remembered, about 50 kB each.
MAX_REMEMBERED = 64


@dataclass(frozen=True)
class AdapterInfo:
    """What a pulled adapter is, known without a model.

    Args:
        name (`str`): repo id or folder name.
        path (`Path`): local folder (a snapshot for a repo) that holds the files.
        revision (`str`, *optional*): commit SHA, None for a plain local folder.
        sha256 (`str`): of `file`.
        base_model (`str`, *optional*): what the adapter's config names as its base, with `base_revision`.
        peft_type (`str`): `"LORA"`, `"LOHA"`, ...
        rank (`int`, *optional*): the config's `r`; None for types without a rank. `alpha` likewise.
        targets (`tuple[str, ...]`): sorted leaf names of the targets as in the file, e.g. `("fc1", "q_proj")`.
        num_parameters (`int`): numbers in the file, the head's included.
        size_bytes (`int`): size of the file.
        num_classes (`int`, *optional*): rows of the head; None where the file has no head.
        labels (`tuple[str, ...]`, *optional*): from the card, when their number is the head's or there is no head.
        generation (`int`, *optional*): major version of transformers that alone gives the keys' names, 4 or 5; None
            where both do, as for most classes of CLIP and SigLIP.
        config (`dict`): parsed `adapter_config.json`.
        prompt (`str`, *optional*): what `labels` were put into, where the head was made of them.
        file (`str`): what the tensors lie in, `adapter_model.safetensors` or, where they are coded,
            `adapter_codes.safetensors`.
        bits (`int`, *optional*): for each weight, where they are coded.
    """

    name: str
    path: Path
    revision: str | None
    sha256: str
    base_model: str | None
    base_revision: str | None
    peft_type: str
    rank: int | None
    alpha: float | None
    targets: tuple[str, ...]
    num_parameters: int
    size_bytes: int
    num_classes: int | None
    labels: tuple[str, ...] | None
    generation: int | None
    config: dict[str, Any]
    prompt: str | None = None
    file: str = WEIGHTS_FILE
    bits: int | None = None

    @property
    def where(self) -> str:
        """Name and commit, as error messages give them."""
        return f"{self.name}@{self.revision}" if self.revision else self.name

    @property
    def converted(self) -> bool | None:
        """Whether its tensors have names of an older transformers, which loading turns into today's."""
        return None if self.generation is None else self.generation < int(transformers.__version__.split(".")[0])

    def to_source(self) -> dict[str, Any]:
        """What manifests, sidecars and cards say of an adapter that something was made of."""
        return {
            "name": self.name,
            "revision": self.revision,
            "sha256": self.sha256,
            "peft_type": self.peft_type,
            "license": read_license(self.path),
        }

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON types."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)} | {"converted": self.converted}
        labels = None if self.labels is None else list(self.labels)
        return copy.deepcopy(values) | {"path": str(self.path), "targets": list(self.targets), "labels": labels}


@dataclass
class LoadedAdapter:
    """An adapter read for one headless live model.

    Args:
        info (`AdapterInfo`): `generation` is now what the model's names showed.
        peft_config (`PeftConfig`): its `target_modules` are the sorted live module paths that own adapter tensors.
        state_dict (`dict[str, Tensor]`): float32, keys `base_model.model.<live module>...` without an adapter name.
        head_weight (`Tensor`, *optional*): (C, D) float32; D is the hidden size, or twice that for DINOv2.
        head_bias (`Tensor`, *optional*): (C,) float32.
        pooled_head (`bool`): whether the head reads the pooled image, not what the family's classifier reads.
    """

    info: AdapterInfo
    peft_config: PeftConfig
    state_dict: dict[str, Tensor]
    head_weight: Tensor | None
    head_bias: Tensor | None
    pooled_head: bool = False


def find_adapters(folder: str | Path) -> list[Path]:
    """The folder itself if it is an adapter, else its direct sub-folders that are, sorted by name.

    Raises:
        AdapterError: the folder is missing or holds no adapter, or a link to one that lies elsewhere.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise AdapterError(f"{folder}: no such folder.")
    if (folder / CONFIG_FILE).is_file():
        return [folder]
    # a hidden folder is one that a writer has not finished
    found = sorted(p.parent for p in folder.glob(f"*/{CONFIG_FILE}") if not p.parent.name.startswith("."))
    if outside := [path for path in found if not path.resolve().is_relative_to(folder.resolve())]:
        raise AdapterError(
            f"{folder}: {outside[0].name} is a link that leaves the folder, to {outside[0].resolve()}. To use that "
            "adapter, name its own folder."
        )
    if not found:
        raise AdapterError(f"{folder}: no adapter here; neither it nor its sub-folders hold {CONFIG_FILE}.")
    return found


def pull_adapter(
    repo_or_path: str | Path,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> AdapterInfo:
    """Fetch one adapter at one commit, check its files without loading tensors, and describe it.

    Args:
        repo_or_path (`str` or `Path`): a local folder if one exists by that name, else a repo id on the Hub.
        revision (`str`, *optional*): branch, tag or commit; resolved once to a commit. Not for a local folder.
        token (`str` or `bool`, *optional*): for private and gated repos, as in `huggingface_hub`.
        cache_dir (`str` or `Path`, *optional*): defaults to the Hugging Face cache.
        local_files_only (`bool`, *optional*, defaults to `False`): look in the cache only.

    Raises:
        AdapterError: nothing there, files missing, damaged, unsafe or of an unknown adapter type.
    """
    folder = Path(repo_or_path)
    if folder.is_dir():
        if revision is not None:
            raise AdapterError(f"{folder}: a local folder has no revision {revision!r}; leave `revision` out.")
        folder = folder.resolve()
        return _describe(folder, folder.name, None)
    folder = download(str(repo_or_path), revision, token, cache_dir, local_files_only)
    return _describe(folder, str(repo_or_path), folder.name)


def load_adapter(
    info: AdapterInfo, model: PreTrainedModel, expected: dict[str, dict[str, Tensor]] | None = None
) -> LoadedAdapter:
    """Read a pulled adapter's tensors for the headless `model`, which is not changed.

    Load all adapters before one is put on `model`: PEFT replaces modules in place, and their names with them.

    Args:
        info (`AdapterInfo`): from [`pull_adapter`].
        model (`PreTrainedModel`): the headless backbone.
        expected (`dict`, *optional*): kept between calls for the same `model`, it saves building PEFT's model again
            for adapters of a config that was met before, which is most of the time. Filled here, and bounded.

    Raises:
        AdapterError: a tensor is not finite, missing, unexpected or of another shape or kind of number than `model`
            needs; the head is neither `hidden_size` nor twice that wide; or the config would change the base model.
    """
    shapes = read_header(info.path, info.where)
    if (info.path / info.file).stat().st_size != info.size_bytes:
        raise _changed(info)
    head = _head_keys(info, shapes, model.config.hidden_size)
    try:
        used = without_training_only(info.config, shapes.keys() - set(head.values()))
        names, converted = to_backbone_keys(used, model)
        peft_config = rebuild_config(info.config, names, model)
    except AdapterError as error:
        raise AdapterError(f"{info.where}: {info.file}: {error}") from error
    live_shapes = {names[key]: shapes[key] for key in names}
    saved = _check_against_model(info, peft_config, live_shapes, model, {} if expected is None else expected)
    tensors = read_tensors(info)  # only now: nothing of an absurd size gets this far
    state_dict = {names[key]: tensors[key] for key in sorted(names)}
    heads = {part: tensors[key] for part, key in head.items()}
    _check_numbers(info, state_dict | {head[part]: tensor for part, tensor in heads.items()}, saved)
    info = dataclasses.replace(info, generation=4) if converted else info
    pooled = POOLED_HEAD in shapes
    return LoadedAdapter(info, peft_config, state_dict, heads.get("weight"), heads.get("bias"), pooled)


def _describe(folder: Path, name: str, revision: str | None) -> AdapterInfo:
    where = f"{name}@{revision}" if revision else name
    config, file = read_config(folder, where), weights_file(folder)
    bits, shapes = read_codes(folder, where) if file == CODES_FILE else (None, read_header(folder, where))
    num_classes, sha256 = head_classes(shapes, where), file_sha256(folder / file)
    check_checksums(folder, where, config, sha256)
    return AdapterInfo(
        name=name,
        path=folder,
        revision=revision,
        sha256=sha256,
        base_model=config.get("base_model_name_or_path"),
        base_revision=config.get("revision"),
        peft_type=config["peft_type"],
        rank=config.get("r") if isinstance(config.get("r"), int) else None,
        alpha=config.get("lora_alpha", config.get("alpha")),
        targets=target_names(config, shapes),
        num_parameters=sum(count(shape) for shape in shapes.values()),
        size_bytes=(folder / file).stat().st_size,
        num_classes=num_classes,
        labels=read_labels(folder, where, num_classes),
        generation=guess_generation(config, shapes),
        config=config,
        file=file,
        bits=bits,
    )


def read_tensors(info: AdapterInfo) -> dict[str, Tensor]:
    """All tensors of the file, decoded, numbers as float32. Raises `AdapterError` where the file changed."""
    where = f"{info.where}: {info.file}"
    try:
        data = (info.path / info.file).read_bytes()
        if hashlib.sha256(data).hexdigest() != info.sha256:
            raise _changed(info)
        tensors = decode(data) if info.file == CODES_FILE else load(data)
    except AdapterError:
        raise
    except (OSError, SafetensorError, ValueError) as error:
        raise AdapterError(f"{where} cannot be read ({error}).") from error
    return {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}


def _changed(info: AdapterInfo) -> AdapterError:
    return AdapterError(f"{info.where}: {info.file} changed since it was pulled; pull it again.")


def _head_keys(info: AdapterInfo, shapes: dict[str, tuple[int, ...]], hidden: int) -> dict[str, str]:
    """Keys of the head's (C, D) `weight` and (C,) `bias`, as far as the file has them."""
    head = {key.rsplit(".", 1)[-1]: key for key in shapes if HEAD.fullmatch(key)}
    width = shapes[head["weight"]][1] if "weight" in head else hidden
    if width not in (hidden, 2 * hidden):
        raise AdapterError(
            f"{info.where}: {info.file}: {head['weight']} reads {width} features, but the model has "
            f"{hidden} (or {2 * hidden} with the mean of its patches). Was it made for another base model?"
        )
    return head


def _check_against_model(
    info: AdapterInfo,
    peft_config: PeftConfig,
    shapes: dict[str, tuple[int, ...]],
    model: nn.Module,
    met: dict[str, dict[str, Tensor]],
) -> dict[str, Tensor]:
    """Build the PEFT model without memory, and compare the names and shapes it would save with the adapter's.

    Returns what PEFT would save, on the meta device; `met` remembers it by config.
    """
    where = f"{info.where}: {info.file}"
    own = {PEFT_PREFIX + name for name, _ in model.named_parameters()} & shapes.keys()
    if own and info.peft_type != "LN_TUNING":  # only that type stores its tensors under the base's own names
        raise AdapterError(f"{where}: {min(own)} retrains a weight of the base model, which adapters here share.")
    config = repr(peft_config)
    if config not in met:
        try:
            made = _expected_tensors(peft_config, model)
        except Exception as error:  # noqa: BLE001 - PEFT raises anything for settings that anyone may have written
            raise AdapterError(f"{info.where}: PEFT cannot build this adapter on the model: {error}") from error
        if len(met) >= MAX_REMEMBERED:
            met.clear()
        met[config] = {key: tensor.detach().to("meta") for key, tensor in made.items()}
    expected = met[config]
    for kind, keys in (("lacks", expected.keys() - shapes), ("holds unexpected", shapes.keys() - expected)):
        if keys:
            raise AdapterError(f"{where} {kind} {len(keys)} tensor(s): {', '.join(sorted(keys)[:3])}.")
    for key, shape in sorted(shapes.items()):
        if shape != tuple(expected[key].shape):
            raise AdapterError(
                f"{where}: {key} must be {tuple(expected[key].shape)}, got {shape}. "
                "Was the adapter made for another base model?"
            )
    return expected


def _check_numbers(info: AdapterInfo, tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Indices are whole numbers and all the rest, the head too, is floating point; nothing is NaN or infinite."""
    for key, tensor in tensors.items():
        floating = key not in expected or expected[key].is_floating_point()
        if tensor.is_complex() or tensor.is_floating_point() != floating:
            kind = "floating point" if floating else "whole numbers"
            raise AdapterError(f"{info.where}: {info.file}: {key} must be {kind}, got {tensor.dtype}.")
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"{info.where}: {info.file}: {key} holds NaN or infinity.")


def _expected_tensors(peft_config: PeftConfig, model: nn.Module) -> dict[str, Tensor]:
    """What PEFT would save for such an adapter; the tensors are on the meta device where PEFT can build it there."""
    # the memo makes deepcopy take these for the weights: a copy of the model on the meta device
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in model.parameters()
    }
    memo |= {id(b): b.detach().to("meta") for b in model.buffers()}
    try:
        return _saved_by_peft(peft_config, copy.deepcopy(model, memo), low_cpu_mem_usage=True)
    except NotImplementedError:  # types whose shapes follow from the values of the base's weights
        return _saved_by_peft(peft_config, copy.deepcopy(model).float().cpu(), low_cpu_mem_usage=False)


def _saved_by_peft(peft_config: PeftConfig, model: nn.Module, low_cpu_mem_usage: bool) -> dict[str, Tensor]:
    wearing = wrap(model, copy.deepcopy(peft_config), low_cpu_mem_usage=low_cpu_mem_usage)
    return get_peft_model_state_dict(wearing, save_embedding_layers=False)
