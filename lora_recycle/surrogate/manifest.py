"""What a manifest may say: it comes from anyone, and pages, cards and training take its numbers at their word."""

from __future__ import annotations

import math
import re
from pathlib import PurePosixPath
from typing import Any

from ..runtime.untrusted_files import check_file_name


#: Images of one adapter, and of all together.
MAX_IMAGES = 100_000_000
_LICENSE = re.compile(r"[\w.+-]{1,200}")


def check_manifest(manifest: Any) -> None:
    """Raises `ValueError` where a manifest lacks what reading the data set needs, or leads out of its folder."""
    if not isinstance(manifest, dict) or not isinstance(manifest.get("shards"), list) or not manifest["shards"]:
        raise ValueError("it lists no shards")
    for key in ("config", "backbone"):
        if not isinstance(manifest.get(key, {}), dict):
            raise ValueError(f"{key} must be a JSON object")
    for key in ("name", "revision"):
        if not isinstance(manifest.get("backbone", {}).get(key), (str, type(None))):
            raise ValueError(f"{key} of the backbone must be a string")
        check_file_name(manifest.get("backbone", {}).get(key) or "", f"{key} of the backbone")
    check_starts(manifest.get("config", {}))
    for entry in manifest["shards"]:
        _check_entry(entry)
    if sum(entry["num_images"] for entry in manifest["shards"]) > MAX_IMAGES:
        raise ValueError(f"it lists more than {MAX_IMAGES} images")
    _check_failed(manifest.get("failed", []))


def check_starts(config: dict[str, Any]) -> None:
    """Raises `ValueError` where a recipe's starting images and steps are not what a card can tell of them."""
    starts, iterations = config.get("starts", {}), config.get("iterations", 0)
    if not isinstance(starts, dict) or not all(_is_number(share) for share in starts.values()):
        raise ValueError("starts must map kinds of images to shares")
    if type(iterations) is not int:
        raise ValueError(f"iterations is {iterations!r:.80}")


def check_source(source: Any) -> dict[str, Any]:
    """The entry of one source adapter. Raises `ValueError` where it names none, or tells of it what is no text."""
    if not isinstance(source, dict) or not all(isinstance(source.get(key), str) for key in ("name", "sha256")):
        raise ValueError("it names no adapter with its checksum")
    for key in ("revision", "peft_type", "license"):
        if not isinstance(source.get(key), (str, type(None))):
            raise ValueError(f"{key} of an adapter must be a string, got {source[key]!r:.80}")
    if source.get("license") is not None and not _LICENSE.fullmatch(source["license"]):
        raise ValueError(f"license of an adapter is {source['license']!r:.80}")
    labels = source.get("labels")
    if labels is not None and not (isinstance(labels, list) and all(isinstance(name, str) for name in labels)):
        raise ValueError("labels of an adapter must be names")
    return source


def _check_entry(entry: Any) -> None:
    if not isinstance(entry, dict):
        raise ValueError("a shard's entry must be a JSON object")
    check_source(entry.get("adapter"))
    number = entry.get("num_images")
    if type(number) is not int or not 1 <= number <= MAX_IMAGES:
        raise ValueError(f"num_images of a shard is {number!r:.80}, not 1 to {MAX_IMAGES}")
    for key in ("accuracy", "confidence"):
        if not _is_number(entry.get(key)) or not 0 <= entry[key] <= 1:
            raise ValueError(f"{key} of a shard is {entry.get(key)!r:.80}, not 0 to 1")
    if not isinstance(entry.get("sha256"), str):
        raise ValueError(f"sha256 of a shard is {entry.get('sha256')!r:.80}")
    file = PurePosixPath(entry["file"] if isinstance(entry.get("file"), str) else "/")
    if file.is_absolute() or ".." in file.parts or "\\" in str(file) or file.suffix != ".safetensors":
        raise ValueError(f"it names a file outside the folder, or no shard: {entry.get('file')!r:.200}")


def _check_failed(failed: Any) -> None:
    if not isinstance(failed, list) or not all(
        isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("name", "sha256", "reason"))
        for entry in failed
    ):
        raise ValueError("failed must list adapters by name, sha256 and reason")


def _is_number(value: Any) -> bool:
    """JSON's integers may be too long for a float."""
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:
        return False
