"""Folders of meta-LoRAs and of single adapters to the Hub."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from ..adapters.experts import EXPERT_FILES, DomainEntries, pull_experts, read_domains
from ..adapters.files import check_task, checksums
from ..adapters.pull import AdapterInfo, pull_adapter, read_tensors
from ..adapters.quantization import check_bits, weights_bytes
from ..errors import AdapterError, PushError
from ..hub.card_files import read_card
from ..hub.cards import NO_CARD, is_repo_id, meta_lora_card
from ..hub.repo_files import (
    CARD_FILE,
    CODES_FILE,
    CONFIG_FILE,
    EXPERTS_FOLDER,
    PICTURE_FILE,
    SIDECAR_FILE,
    TASK_FILE,
    WEIGHTS_FILE,
    expert_folder,
    optional_file,
)
from ..hub.upload import push_files, without_local_paths
from ..runtime.files import creating_folder
from ..runtime.outputs import check_output
from ..runtime.terminal import utf8
from .sidecar import read_picture, read_sidecar, task_file


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
    files = adapter_files(info, repo_id, bits)
    message = commit_message or f"Upload {'meta-LoRA' if SIDECAR_FILE in files else 'adapter'} with lora-recycle"
    replaces = [WEIGHTS_FILE, CODES_FILE, SIDECAR_FILE, TASK_FILE, PICTURE_FILE]
    replaces += [f"{EXPERTS_FOLDER}/*/{name}" for name in EXPERT_FILES]
    return push_files(repo_id, files, replaces=replaces, commit_message=message, **options)


def adapter_files(info: AdapterInfo, name: str, bits: int | None = None) -> dict[str, Path | bytes]:
    """The files that belong to an adapter, its weights in so many bits, and the card of a meta-LoRA written anew.

    Args:
        name: what the card calls it, a repo id or a folder's name.

    Raises:
        AdapterError: the sidecar is damaged, or lacks what a card tells; the weights changed since the pull; or a file
            is a link out of the folder, which could lead to any file of this machine.
        ConfigError: another number of bits.
    """
    found = {name: optional_file(info.path, name, info.where) for name in _names(info)}
    files: dict[str, Path | bytes] = {name: path for name, path in found.items() if path is not None}
    if bits is not None:
        check_bits(bits)
        del files[info.file]
        try:
            file, content = weights_bytes(read_tensors(info), bits, info.config)
        except AdapterError as error:
            raise AdapterError(f"{info.where}: {info.file}: {error}") from error
        files[file] = content
        info = dataclasses.replace(info, file=file, bits=bits if file == CODES_FILE else None)
    settings = without_local_paths(read_sidecar(info.path / SIDECAR_FILE))
    if settings and PICTURE_FILE in files and read_picture(info) is None:
        del files[PICTURE_FILE]  # no picture
    if settings:
        check_task(info.path, info.where, settings)
        settings["checksums"] = _checksums(info, files)
        if (domains := read_domains(settings, info.where)) is not None:
            files |= _expert_files(pull_experts(info, domains, {}), bits)
            settings["domains"] = _with_checksums(domains, files).to_dict()
        files[SIDECAR_FILE] = json.dumps(settings, indent=1, allow_nan=False).encode()
        files[CARD_FILE] = _card(info, name, settings, PICTURE_FILE in files)
    elif CARD_FILE in files:
        files[CARD_FILE] = _with_base(info)
    return files


def write_adapter(info: AdapterInfo, folder: str | Path, bits: int) -> None:
    """Write a pulled adapter, with all that belongs to it, with its weights in so many bits.

    Raises:
        AdapterError: as of [`adapter_files`].
        ConfigError: another number of bits.
        StorageError: `folder` is not new or empty, or cannot be written.
    """
    folder = Path(folder)
    check_output(folder)
    check_bits(bits)
    task_file(info, read_sidecar(info.path / SIDECAR_FILE), {})  # pulled with the rest only when it is asked for
    files = adapter_files(info, folder.name, bits)
    with creating_folder(folder) as new:
        for name, content in files.items():
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            (new / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())


def _expert_files(experts: list[AdapterInfo], bits: int | None) -> dict[str, Path | bytes]:
    """The files of the experts by their place in the repo, their weights in so many bits."""
    files: dict[str, Path | bytes] = {}
    for number, expert in enumerate(experts, 1):
        folder = expert_folder(number)
        files[f"{folder}/{CONFIG_FILE}"] = expert.path / CONFIG_FILE
        if bits is None:
            files[f"{folder}/{expert.file}"] = expert.path / expert.file
        else:
            file, content = weights_bytes(read_tensors(expert), bits, expert.config)
            files[f"{folder}/{file}"] = content
    return files


def _with_checksums(domains: DomainEntries, files: dict[str, Path | bytes]) -> DomainEntries:
    """The entries with the checksums of weights that are written in other bits."""
    entries = []
    for number, entry in enumerate(domains.experts, 1):
        stated = {CONFIG_FILE: entry.checksums[CONFIG_FILE]}
        for file in (WEIGHTS_FILE, CODES_FILE):
            content = files.get(f"{expert_folder(number)}/{file}")
            if isinstance(content, bytes):
                stated[file] = hashlib.sha256(content).hexdigest()
            elif content is not None:
                stated[file] = entry.checksums[file]
        entries.append(dataclasses.replace(entry, checksums=stated))
    return dataclasses.replace(domains, experts=entries)


def _checksums(info: AdapterInfo, files: dict[str, Path | bytes]) -> dict[str, str]:
    """As [`hub.files.checksums`] of a folder with these files."""
    found = checksums(info.path)
    for name, content in files.items():
        if isinstance(content, bytes) and name in (WEIGHTS_FILE, CODES_FILE):
            found = {kept: digits for kept, digits in found.items() if kept not in (WEIGHTS_FILE, CODES_FILE)}
            found[name] = hashlib.sha256(content).hexdigest()
    return found


def _names(info: AdapterInfo) -> list[str]:
    names = [CONFIG_FILE, info.file, CARD_FILE]
    return names + [SIDECAR_FILE, TASK_FILE, PICTURE_FILE] if (info.path / SIDECAR_FILE).is_file() else names


def _card(info: AdapterInfo, repo_id: str, settings: dict[str, Any], picture: bool) -> bytes:
    try:
        card = meta_lora_card(repo_id, info.base_model, info.base_revision, info.rank, settings, picture, info.bits)
    except NO_CARD as error:
        raise AdapterError(f"{info.where}: {SIDECAR_FILE} lacks what a card tells ({error!r}).") from error
    return utf8(card)


def _with_base(info: AdapterInfo) -> bytes:
    """The adapter's own card; where it names a folder as the base model, which the Hub refuses, the config's name."""
    try:
        card = read_card(info.path / CARD_FILE)
    except (OSError, ValueError) as error:
        raise AdapterError(f"{info.where}: {CARD_FILE}: {error}. Mend it, or take it out.") from error
    named = card.metadata.get("base_model")
    if not isinstance(named, str) or is_repo_id(named) or info.base_model is None:
        return (info.path / CARD_FILE).read_bytes()
    text = str(dataclasses.replace(card, metadata=card.metadata | {"base_model": info.base_model}))
    return (text.replace(named, info.base_model) if "/" in named or "\\" in named else text).encode()  # PEFT's tags
