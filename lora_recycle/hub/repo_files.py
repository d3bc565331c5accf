"""The files of an adapter repo by name, how large they may be, and where they may lie."""

from __future__ import annotations

from pathlib import Path

from ..errors import AdapterError
from ..runtime.untrusted_files import path_inside


CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
#: Weights of few bits, which only this library reads.
CODES_FILE = "adapter_codes.safetensors"
CARD_FILE = "README.md"
SIDECAR_FILE = "meta_lora_config.json"
#: The fitted task of a meta-LoRA.
TASK_FILE = "few_shot_task.safetensors"
#: The grid of surrogate images beside a meta-LoRA's, or surrogate data's, card.
PICTURE_FILE = "surrogate.png"
#: The experts of a meta-LoRA lie in numbered folders of this one, each a plain PEFT adapter.
EXPERTS_FOLDER = "experts"
MAX_EXPERTS = 16
MAX_PICTURE_BYTES = 10 * 1024**2
MAX_CLASSES = 100_000


def expert_folder(number: int) -> str:
    """Folder of an expert in the repo, numbered from 1 on in the order of the sidecar."""
    return f"{EXPERTS_FOLDER}/{number}"


def checked_file(folder: Path, name: str, where: str) -> Path:
    """The file's path. Raises `AdapterError` where it is missing, not regular, or a link out of the repo."""
    path = optional_file(folder, name, where)
    if path is None:
        raise AdapterError(f"{where}: {name} is missing in {folder}.")
    return path


def optional_file(folder: Path, name: str, where: str) -> Path | None:
    """The same, None where it is missing."""
    try:
        return path_inside(folder, name)
    except (OSError, ValueError) as error:
        raise AdapterError(f"{where}: {error}. Put the file itself in its place, or take it out.") from error
