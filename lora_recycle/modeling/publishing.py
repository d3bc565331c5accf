"""Folders of meta-LoRAs and of single adapters to the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from ..errors import AdapterError, PushError
from ..hub.adapters import AdapterInfo, pull_adapter
from ..hub.cards import is_repo_id, meta_lora_card
from ..hub.files import CARD_FILE, CONFIG_FILE, PICTURE_FILE, SIDECAR_FILE, WEIGHTS_FILE
from ..hub.publish import push_files, without_local_paths
from .sidecar import TASK_FILE, read_picture, read_sidecar


def push_adapter_folder(folder: str | Path, repo_id: str, *, commit_message: str | None = None, **options) -> str:
    """Push a meta-LoRA, with a card written for the repo, or another adapter with the card that it has.

    Only the files that belong to it travel. `options` are those of [`hub.publish.push_files`].

    Raises:
        AdapterError: the folder is no adapter, or damaged.
        PushError: its base model is a local folder, or the push failed.
    """
    info = pull_adapter(Path(folder))
    if not is_repo_id(info.base_model):
        raise PushError(
            f"{folder}: its base model is {info.base_model!r}, which nobody else can load. Publish the base model "
            f"and put its repo id into {CONFIG_FILE} as base_model_name_or_path."
        )
    settings, names = read_sidecar(info.path / SIDECAR_FILE), [CONFIG_FILE, WEIGHTS_FILE, CARD_FILE]
    settings = without_local_paths(settings)
    if settings:
        names += [SIDECAR_FILE, TASK_FILE, PICTURE_FILE]
    files: dict[str, Path | bytes] = {name: info.path / name for name in names if (info.path / name).is_file()}
    linked = [name for name in files if (info.path / name).is_symlink()]
    if linked:  # a stranger's folder could lead to any file of this machine
        raise PushError(f"{folder}: {linked[0]} is a link. Copy the folder with `cp -L` to publish it.")
    if settings and PICTURE_FILE in files and read_picture(info) is None:
        del files[PICTURE_FILE]  # no picture
    if settings:
        files[SIDECAR_FILE] = json.dumps(settings, indent=1).encode()
        files[CARD_FILE] = _card(info, repo_id, settings, PICTURE_FILE in files)
    elif CARD_FILE in files:
        files[CARD_FILE] = _with_base(info)
    message = commit_message or f"Upload {'meta-LoRA' if settings else 'adapter'} with lora-recycle"
    return push_files(
        repo_id, files, replaces=[SIDECAR_FILE, TASK_FILE, PICTURE_FILE], commit_message=message, **options
    )


def _card(info: AdapterInfo, repo_id: str, settings: dict[str, Any], picture: bool) -> bytes:
    try:
        card = meta_lora_card(repo_id, info.base_model, info.base_revision, info.rank, settings, picture)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise AdapterError(f"{info.where}: {SIDECAR_FILE} lacks what a card tells ({error!r}).") from error
    return card.encode()


def _with_base(info: AdapterInfo) -> bytes:
    """The adapter's own card; where it names a folder as the base model, which the Hub refuses, the config's name."""
    text = (info.path / CARD_FILE).read_text(encoding="utf-8")
    card = ModelCard(text, ignore_metadata_errors=True)
    named = card.data.get("base_model")
    if not isinstance(named, str) or is_repo_id(named):
        return text.encode()
    card.data.base_model = info.base_model
    text = str(card)
    return (text.replace(named, info.base_model) if "/" in named or "\\" in named else text).encode()  # PEFT's tags
