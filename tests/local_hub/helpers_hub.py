"""Adapters on the local Hub."""

import json
from pathlib import Path


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def publish(hub, repo_id: str, folder: Path, base: str = "org/base", revision: str = "main", **config) -> str:
    """Commit the adapter of `folder`, its config changed; returns the SHA."""
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    settings = json.loads(files[CONFIG]) | {"base_model_name_or_path": base} | config
    return hub.put(repo_id, files | {CONFIG: json.dumps(settings)}, revision=revision)


def cached(cache: Path, name: str) -> list[Path]:
    """All that a cache holds of a file of one repo: the links by their name, and what they lead to."""
    return [path for path in Path(cache).rglob(f"snapshots/*/{name}") if path.exists()]
