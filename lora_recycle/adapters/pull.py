"""Adapters of the Hub or of a folder: fetched at one commit, checked, described, and read for one live backbone."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ..backbones.base_models import WEIGHTS as MODEL_WEIGHTS
from ..errors import AdapterError
from ..hub.download import HubOptions
from ..hub.licenses import read_license
from ..hub.repo_files import CODES_FILE, WEIGHTS_FILE, checked_file
from ..runtime.files import file_sha256
from ..runtime.untrusted_files import check_utf8
from ..runtime.untrusted_tensors import count
from .checkpoint_files import CHECKPOINT, config_labels, named_in_config, read_base_name, read_checkpoint_settings
from .files import (
    BIN_FILES,
    check_checksums,
    guess_generation,
    head_classes,
    pickled,
    read_codes,
    read_config,
    read_header,
    read_labels,
    read_shapes,
    target_names,
    weights_file,
    without_twins,
)
from .other_names import PEFT_PREFIX
from .places import Place, join_name, only_place, place_of_folder, places_in_repo, split_name
from .quantization import decode


#: Pickled weights and what they would be converted to, of an adapter and of a checkpoint.
_CONVERTED = tuple(zip(BIN_FILES, (WEIGHTS_FILE, MODEL_WEIGHTS), strict=True))


@dataclass(frozen=True)
class AdapterInfo:
    """What a pulled adapter is, known without a model.

    Args:
        name (`str`): repo id or folder name.
        path (`Path`): local folder (a snapshot for a repo) that holds the files.
        revision (`str`, *optional*): commit SHA, None for a plain local folder.
        sha256 (`str`): of `file`.
        base_model (`str`, *optional*): what the adapter's config names as its base, with `base_revision`.
        peft_type (`str`): `"LORA"`, `"LOHA"`, ...; `"CHECKPOINT"` for all weights of a tuned model.
        rank (`int`, *optional*): the config's `r`; None for types without a rank. `alpha` likewise.
        targets (`tuple[str, ...]`): sorted leaf names of the targets as in the file, e.g. `("fc1", "q_proj")`.
        num_parameters (`int`): numbers in the file, the head's included.
        size_bytes (`int`): size of the file.
        num_classes (`int`, *optional*): rows of the head; None where the file has no head.
        labels (`tuple[str, ...]`, *optional*): from the card, or the `config.json` beside the weights, when their
            number is the head's or there is no head.
        generation (`int`, *optional*): major version of transformers that alone gives the keys' names, 4 or 5; None
            where both do, as for most classes of CLIP and SigLIP.
        config (`dict`): parsed `adapter_config.json`, or a checkpoint's `config.json`.
        prompt (`str`, *optional*): what `labels` were put into, where the head was made of them.
        file (`str`): what the tensors lie in, `adapter_model.safetensors` or, where they are coded,
            `adapter_codes.safetensors`; of a checkpoint `model.safetensors`.
        bits (`int`, *optional*): for each weight, where they are coded.
        support (`str`, *optional*): checksum of the labelled images that the head was fitted to.
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
    support: str | None = None

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


def pull_adapter(
    repo_or_path: str | Path,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    *,
    subfolder: str | None = None,
) -> AdapterInfo:
    """Fetch one adapter at one commit, check its files without loading tensors, and describe it.

    A repo without an adapter at its top may hold one in a sub-folder, which is found; of the `checkpoint-*` of a
    training run the last one counts.

    Args:
        repo_or_path (`str` or `Path`): a local folder if one exists by that name, else a repo id on the Hub, or
            `org/name/sub-folder`.
        revision (`str`, *optional*): branch, tag or commit; resolved once to a commit. Not for a local folder.
        token (`str` or `bool`, *optional*): for private and gated repos, as in `huggingface_hub`.
        cache_dir (`str` or `Path`, *optional*): defaults to the Hugging Face cache.
        local_files_only (`bool`, *optional*, defaults to `False`): look in the cache only.
        force_download (`bool`, *optional*, defaults to `False`): fetch again what the cache holds.
        subfolder (`str`, *optional*): where in the folder or repo the adapter lies.

    Raises:
        AdapterError: nothing there, or several adapters; files missing, damaged, unsafe or of an unknown adapter type;
            or what is there is a whole checkpoint, which [`AdapterPool.from_pretrained`] takes.
    """
    name = join_name(str(repo_or_path), subfolder)
    if subfolder is not None:
        split_name(f"{Path(repo_or_path).name}/_/{subfolder}")  # refuses one that leaves the folder
    hub = HubOptions(
        token=token, cache_dir=cache_dir, local_files_only=local_files_only, force_download=force_download
    )
    place = only_place(find_places(name, revision, hub), name)
    if place.is_checkpoint:
        raise AdapterError(
            f"{place.where}: is a whole checkpoint, not an adapter. A pool takes it as it is; `lora-recycle extract` "
            "makes an adapter of what was tuned in it."
        )
    return describe_place(place)


def find_places(name: str, revision: str | None, hub: HubOptions) -> list[Place]:
    """The adapters and checkpoints that a folder, a repo id or `org/name/sub-folder` means, their files fetched."""
    folder = Path(name)
    if not folder.is_dir():
        return places_in_repo(name, revision, hub)
    if revision is not None:
        raise AdapterError(f"{folder}: a local folder has no revision {revision!r}; leave `revision` out.")
    folder = folder.resolve()
    try:
        check_utf8(folder)
    except ValueError as error:
        raise AdapterError(f"{folder}: {error}.") from error
    return [place_of_folder(folder) or Place(folder, folder.name)]  # the second: an error says what is missing


def describe_place(place: Place) -> AdapterInfo:
    """What lies in a place, checked as [`pull_adapter`] does."""
    if place.is_bin:
        raise pickled(place.where, *_CONVERTED[place.is_checkpoint])
    if place.is_checkpoint:
        return describe_checkpoint(place.folder, place.name, place.revision)
    return describe_adapter(place.folder, place.name, place.revision)


def describe_adapter(folder: Path, name: str, revision: str | None) -> AdapterInfo:
    """What lies in a local folder, checked as [`pull_adapter`] does."""
    where = f"{name}@{revision}" if revision else name
    config, file = read_config(folder, where), weights_file(folder)
    bits, shapes = read_codes(folder, where) if file == CODES_FILE else (None, read_header(folder, where))
    shapes = without_twins(config, shapes)
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


def describe_checkpoint(folder: Path, name: str, revision: str | None) -> AdapterInfo:
    """A whole checkpoint as a member of a pool: its base is the one that its card or its `config.json` names.

    Raises:
        AdapterError: its `config.json` is refused (see [`read_base_settings`]), or its weights are damaged or unsafe.
    """
    where = f"{name}@{revision}" if revision else name
    settings = read_checkpoint_settings(folder, where)
    shapes = read_shapes(checked_file(folder, MODEL_WEIGHTS, where), f"{where}: {MODEL_WEIGHTS}")
    keys = {PEFT_PREFIX + key: shape for key, shape in shapes.items()}
    num_classes = head_classes(keys, where)
    return AdapterInfo(
        name=name,
        path=folder,
        revision=revision,
        sha256=file_sha256(folder / MODEL_WEIGHTS),
        base_model=read_base_name(folder, where) or named_in_config(settings),
        base_revision=None,
        peft_type=CHECKPOINT,
        rank=None,
        alpha=None,
        targets=(),
        num_parameters=sum(count(shape) for shape in shapes.values()),
        size_bytes=(folder / MODEL_WEIGHTS).stat().st_size,
        num_classes=num_classes,
        labels=config_labels(settings, num_classes) or read_labels(folder, where, num_classes),
        generation=guess_generation({}, keys),
        config=settings,
        file=MODEL_WEIGHTS,
    )


def read_tensors(info: AdapterInfo) -> dict[str, Tensor]:
    """All tensors of the file, decoded, numbers as float32. Raises `AdapterError` where the file changed."""
    where = f"{info.where}: {info.file}"
    try:
        data = (info.path / info.file).read_bytes()
        if hashlib.sha256(data).hexdigest() != info.sha256:
            raise file_changed(info)
        tensors = decode(data) if info.file == CODES_FILE else load(data)
    except AdapterError:
        raise
    except (OSError, SafetensorError, ValueError) as error:
        raise AdapterError(f"{where} cannot be read ({error}).") from error
    return {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}


def file_changed(info: AdapterInfo) -> AdapterError:
    return AdapterError(f"{info.where}: {info.file} changed since it was pulled; pull it again.")
