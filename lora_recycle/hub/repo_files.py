"""The files of an adapter repo by name, how large they may be, and where they may lie."""

from __future__ import annotations

from pathlib import Path

from ..errors import AdapterError


CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
#: Weights of few bits, which only this library reads.
CODES_FILE = "adapter_codes.safetensors"
CARD_FILE = "README.md"
SIDECAR_FILE = "meta_lora_config.json"
#: The grid of surrogate images beside a meta-LoRA's, or surrogate data's, card.
PICTURE_FILE = "surrogate.png"
MAX_PICTURE_BYTES = 10 * 1024**2
MAX_CARD_BYTES = 1024**2
MAX_CLASSES = 100_000


def checked_file(folder: Path, name: str, where: str) -> Path:
    """The file's path. Raises `AdapterError` where it is missing, not regular, or a link out of the repo."""
    path = folder / name
    if not path.exists():
        raise AdapterError(f"{where}: {name} is missing in {folder}.")
    target = path.resolve()
    if not target.is_file():
        raise AdapterError(f"{where}: {name} is not a regular file.")
    if not any(target.is_relative_to(root) for root in _link_roots(folder)):
        raise AdapterError(f"{where}: {name} is a link that leaves the adapter's folder, to {target}.")
    return path


def _link_roots(folder: Path) -> list[Path]:
    """Where a file of `folder` may really lie: in it or, for `<cache>/<repo>/snapshots/<commit>`, among blobs."""
    folder = folder.resolve()
    if folder.parent.name != "snapshots":
        return [folder]
    repo = folder.parent.parent
    return [folder, repo / "blobs", repo.parent / "blobs"]  # the last: blobs that several repos share
