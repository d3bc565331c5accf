"""Folders of meta-LoRAs and of single adapters to the Hub."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from ..adapters.pull import AdapterInfo, pull_adapter, read_tensors
from ..adapters.quantization import check_bits, weights_bytes
from ..errors import AdapterError, PushError
from ..hub.cards import is_repo_id, meta_lora_card
from ..hub.repo_files import CARD_FILE, CODES_FILE, CONFIG_FILE, PICTURE_FILE, SIDECAR_FILE, WEIGHTS_FILE
from ..hub.upload import push_files, without_local_paths
from ..runtime.files import atomic_write
from .sidecar import TASK_FILE, read_picture, read_sidecar, task_file


def push_adapter_folder(
    folder: str | Path, repo_id: str, *, bits: int | None = None, commit_message: str | None = None, **options: Any
) -> str:
    """Push a meta-LoRA, with a card written for the repo, or another adapter with the card that it has.

    Only the files that belong to it travel. `options` are those of [`hub.upload.push_files`].

    Args:
        bits: for each weight, see [`adapters.quantization.weights_bytes`]; by default the file goes as it is.

    Raises:
        AdapterError: the folder is no adapter, or damaged.
        ConfigError: another number of bits.
        PushError: its base model is a local folder, or the push failed.
    """
    info = pull_adapter(Path(folder))
    if not is_repo_id(info.base_model):
        raise PushError(
            f"{folder}: its base model is {info.base_model!r}, which nobody else can load. Publish the base model "
            f"and put its repo id into {CONFIG_FILE} as base_model_name_or_path."
        )
    linked = [name for name in _names(info) if (info.path / name).is_symlink()]
    if linked:  # a stranger's folder could lead to any file of this machine
        raise PushError(f"{folder}: {linked[0]} is a link. Copy the folder with `cp -L` to publish it.")
    files = adapter_files(info, repo_id, bits)
    message = commit_message or f"Upload {'meta-LoRA' if SIDECAR_FILE in files else 'adapter'} with lora-recycle"
    replaces = [WEIGHTS_FILE, CODES_FILE, SIDECAR_FILE, TASK_FILE, PICTURE_FILE]
    return push_files(repo_id, files, replaces=replaces, commit_message=message, **options)


def adapter_files(info: AdapterInfo, name: str, bits: int | None = None) -> dict[str, Path | bytes]:
    """The files that belong to an adapter, its weights in so many bits, and the card of a meta-LoRA written anew.

    Args:
        name: what the card calls it, a repo id or a folder's name.

    Raises:
        AdapterError: the sidecar is damaged, or lacks what a card tells; or the weights changed since the pull.
        ConfigError: another number of bits.
    """
    files: dict[str, Path | bytes] = {name: info.path / name for name in _names(info) if (info.path / name).is_file()}
    if bits is not None:
        check_bits(bits)
        del files[info.file]
        file, content = weights_bytes(read_tensors(info), bits, info.config)
        files[file] = content
        info = dataclasses.replace(info, file=file, bits=bits if file == CODES_FILE else None)
    settings = without_local_paths(read_sidecar(info.path / SIDECAR_FILE))
    if settings and PICTURE_FILE in files and read_picture(info) is None:
        del files[PICTURE_FILE]  # no picture
    if settings:
        files[SIDECAR_FILE] = json.dumps(settings, indent=1).encode()
        files[CARD_FILE] = _card(info, name, settings, PICTURE_FILE in files)
    elif CARD_FILE in files:
        files[CARD_FILE] = _with_base(info)
    return files


def write_adapter(info: AdapterInfo, folder: str | Path, bits: int) -> None:
    """Write a pulled adapter, with all that belongs to it, with its weights in so many bits.

    Raises:
        AdapterError: as of [`adapter_files`], or `folder` holds an adapter already.
        ConfigError: another number of bits.
    """
    folder = Path(folder)
    if (folder / CONFIG_FILE).exists():
        raise AdapterError(f"{folder}: holds an adapter already. Choose another folder.")
    task_file(info, read_sidecar(info.path / SIDECAR_FILE), {})  # pulled with the rest only when it is asked for
    for name, content in adapter_files(info, folder.name, bits).items():
        atomic_write(folder / name, content if isinstance(content, bytes) else content.read_bytes())


def _names(info: AdapterInfo) -> list[str]:
    names = [CONFIG_FILE, info.file, CARD_FILE]
    return names + [SIDECAR_FILE, TASK_FILE, PICTURE_FILE] if (info.path / SIDECAR_FILE).is_file() else names


def _card(info: AdapterInfo, repo_id: str, settings: dict[str, Any], picture: bool) -> bytes:
    try:
        card = meta_lora_card(repo_id, info.base_model, info.base_revision, info.rank, settings, picture, info.bits)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise AdapterError(f"{info.where}: {SIDECAR_FILE} lacks what a card tells ({error!r}).") from error
    return card.encode()


def _with_base(info: AdapterInfo) -> bytes:
    """The adapter's own card; where it names a folder as the base model, which the Hub refuses, the config's name."""
    text = (info.path / CARD_FILE).read_text(encoding="utf-8")
    card = ModelCard(text, ignore_metadata_errors=True)
    named = card.data.get("base_model")
    if not isinstance(named, str) or is_repo_id(named) or info.base_model is None:
        return text.encode()
    card.data["base_model"] = info.base_model
    text = str(card)
    return (text.replace(named, info.base_model) if "/" in named or "\\" in named else text).encode()  # PEFT's tags
