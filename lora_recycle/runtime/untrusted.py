"""Bytes that anyone may have written, read with limits: JSON, safetensors headers, front matter of cards, settings.

Every function raises `ValueError` with the reason; the callers say in which repo and file. What is read is bounded
before it is parsed (bytes, number of values) and before it is used (depth, names, shapes), so that a small file costs
neither minutes nor gigabytes.
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import yaml


MAX_TEXT_BYTES = 10 * 1024**2
MAX_TENSOR_BYTES = 2 * 1024**3
MAX_FILE_BYTES = 8 * 1024**3
# upper bound: every dtype is counted as float32, which is what loading makes of it
_BYTES_PER_NUMBER = 4
#: Of JSON and YAML: values in all, and how deep lists and objects lie in each other.
MAX_VALUES, MAX_DEPTH = 500_000, 50
#: Of a safetensors file: tensors, characters of a name, and parts of a name between dots.
MAX_TENSORS, MAX_NAME, MAX_NAME_PARTS = 10_000, 500, 40
#: Of a card: its text, its front matter (PyYAML takes 20 s for a megabyte), and values there.
MAX_CARD_BYTES, MAX_FRONT_MATTER, MAX_CARD_VALUES, MAX_CARD_DEPTH = 1024**2, 128 * 1024, 20_000, 20

#: Upper bound of ranks, numbers of blocks and the like, which PEFT turns into memory and loops.
MAX_SIZE_SETTING = 4096
_MAX_LONG_SETTING = 2**24
_LONG_SETTINGS = ("n_frequency", "theta_d_length")
_FREE_SETTINGS = re.compile(r"seed|key|alpha|lambda|step|warmup|interval|t?init$|t?final$|delta|layers_to_transform")
# keys with which transformers and diffusers find code in a repo
_CODE_KEYS = ("auto_map", "trust_remote_code", "custom_pipeline", "custom_pipelines", "_class_name")
# AdaLoRA may leave a layer without any rank
_MAY_BE_EMPTY = re.compile(r".*\.lora_[AEB]")
_COMMIT = re.compile("[0-9a-f]{40}")


def path_inside(folder: Path, name: str) -> Path | None:
    """The path of a file of a folder that anyone may have written; None where there is nothing of this name.

    A link may lead to another file of the folder or, from a snapshot of the Hub's cache, to the cache's own blobs. A
    git clone keeps links, and one that leads elsewhere would pass on a file of this machine as if it were the repo's.

    Raises:
        ValueError: it is no regular file, or a link that leaves the folder.
    """
    path = folder / name
    if not os.path.lexists(path):
        return None
    target = path.resolve()
    if not any(target.is_relative_to(root) for root in _link_roots(folder)):
        raise ValueError(f"{name} is a link that leaves the folder, to {target}")
    if not target.is_file():
        raise ValueError(f"{name} is not a regular file")
    return path


def _link_roots(folder: Path) -> list[Path]:
    """Where a file of `folder` may really lie: in it or, for `<cache>/<repo>/snapshots/<commit>` and what is below,
    among blobs."""
    folder = folder.resolve()
    for commit in (folder, *folder.parents):
        repo = commit.parent.parent
        if commit.parent.name == "snapshots" and _COMMIT.fullmatch(commit.name) and "--" in repo.name:
            return [folder, repo / "blobs", repo.parent / "blobs"]  # the last: shared by several repos
    return [folder]


def check_utf8(path: Path) -> None:
    """Raise `ValueError` where the path is not UTF-8: safetensors opens no such file."""
    try:
        os.fsencode(path).decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError("its path is not UTF-8, which safetensors needs; rename it") from None


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read its bytes.

    Raises:
        ValueError: it is a FIFO, a socket or a device, where a reader might wait forever or find no end.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise ValueError("it is not a regular file")


def read_text(path: Path, most: int = MAX_TEXT_BYTES) -> str:
    """The file as UTF-8. Raises `ValueError` where it is longer than `most` bytes."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise ValueError(f"{size} bytes, more than {most}")
        data = file.read(size + 1)
    if len(data) > size:
        raise ValueError("it grows while it is read")
    return data.decode("utf-8")


def parse_json(text: str | bytes) -> Any:
    """JSON as the standard has it, of bounded size and depth: no key twice, no NaN or infinity."""
    if (text.count(b",") if isinstance(text, bytes) else text.count(",")) >= MAX_VALUES:
        raise ValueError(f"it holds more than {MAX_VALUES} values")
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    _check_depth(value)
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        nested = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, (dict, list))]
        if not nested:
            return
        level = [inner for one in nested for inner in one]
    raise ValueError("nested too deeply")


def parse_front_matter(text: str) -> dict[str, Any]:
    """What lies between the two `---` of a card: a mapping of plain YAML, of bounded size and depth."""
    if len(text.encode()) > MAX_FRONT_MATTER:
        raise ValueError(f"its front matter has {len(text.encode())} bytes, more than {MAX_FRONT_MATTER}")
    try:
        found = yaml.load(text, _PlainLoader)  # noqa: S506 - a safe loader
    except (yaml.YAMLError, OverflowError, RecursionError) as error:
        raise ValueError(f"its front matter is no plain YAML: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(found, dict | None):
        raise ValueError(f"its front matter must be a mapping, got a {type(found).__name__}")
    return found or {}


class _PlainLoader(yaml.SafeLoader):
    """YAML without anchors, aliases, merge keys and tags, which can make a few lines endless, and of bounded size."""

    values = depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor or getattr(event, "tag", None):
            raise yaml.YAMLError(f"anchors, aliases and tags are not read (line {event.start_mark.line + 2})")
        self.values, self.depth = self.values + 1, self.depth + 1
        if self.values > MAX_CARD_VALUES or self.depth > MAX_CARD_DEPTH:
            raise yaml.YAMLError(f"more than {MAX_CARD_VALUES} values, or deeper than {MAX_CARD_DEPTH}")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def flatten_mapping(self, node: Any) -> None:
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise yaml.YAMLError("merge keys (<<) are not read")
        super().flatten_mapping(node)


@dataclass(frozen=True)
class TensorEntry:
    """What a header says of one tensor; its bytes lie from `begin` to `end` after the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class SafetensorsHeader:
    """The header of a safetensors file, of which nothing is read beyond it.

    Args:
        tensors (`dict[str, TensorEntry]`): by name, in the header's order.
        metadata: what it holds beside the tensors, None where that is nothing.
        size (`int`): bytes of the file before the tensors' own.
    """

    tensors: dict[str, TensorEntry]
    metadata: Any
    size: int

    def bounded_shapes(self, most: int = MAX_FILE_BYTES) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor.

        Raises:
            ValueError: there is none, or they would take more than `most` bytes as float32.
        """
        if not self.tensors:
            raise ValueError("it holds no tensors")
        shapes = {name: checked_shape(name, list(entry.shape)) for name, entry in self.tensors.items()}
        check_total(shapes.values(), most)
        return shapes


def read_safetensors_header(path: Path) -> SafetensorsHeader:
    """The header of a file: names once, few and short, sizes whole numbers, and all of it within bounds."""
    with open_regular(path) as file:
        return _read_header(file, os.fstat(file.fileno()).st_size)


def parse_safetensors_header(data: bytes) -> SafetensorsHeader:
    """The same of a file's bytes."""
    return _read_header(io.BytesIO(data), len(data))


def _read_header(file: BinaryIO, size: int) -> SafetensorsHeader:
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise ValueError(f"truncated, a header of {length} bytes in a file of {size}")
    if length > MAX_TEXT_BYTES:
        raise ValueError(f"its header has {length} bytes, more than {MAX_TEXT_BYTES}")
    header = parse_json(file.read(length))
    if not isinstance(header, dict):
        raise ValueError(f"its header must be a JSON object, got a {type(header).__name__}")
    metadata = header.pop("__metadata__", None)
    check_names(header)
    return SafetensorsHeader({name: _entry(name, told) for name, told in header.items()}, metadata, 8 + length)


def _entry(name: str, told: Any) -> TensorEntry:
    told = told if isinstance(told, dict) else {}
    shape, offsets = told.get("shape"), told.get("data_offsets")
    if not _whole_numbers(shape):
        raise ValueError(f"{name} has no shape of whole numbers")
    if not _whole_numbers(offsets) or len(offsets) != 2 or not isinstance(told.get("dtype"), str):
        raise ValueError(f"{name} has no dtype and data_offsets")
    return TensorEntry(told["dtype"], tuple(shape), *offsets)


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int for size in value)


def check_names(names: Iterable[str]) -> None:
    """Refuse tensors that are too many, or whose names are no paths of modules."""
    names = list(names)
    if len(names) > MAX_TENSORS:
        raise ValueError(f"it holds {len(names)} tensors, more than {MAX_TENSORS}")
    for name in names:
        if len(name) > MAX_NAME or name.count(".") >= MAX_NAME_PARTS:
            raise ValueError(
                f"a tensor's name has {len(name)} characters and {name.count('.') + 1} parts, more than {MAX_NAME} "
                f"or {MAX_NAME_PARTS}: {name[:80]}..."
            )


def check_total(shapes: Iterable[tuple[int, ...]], most: int = MAX_FILE_BYTES) -> None:
    """Refuse tensors that would be too large together."""
    total = sum(count(shape) for shape in shapes) * _BYTES_PER_NUMBER
    if total > most:
        raise ValueError(f"its tensors would take {total} bytes as float32, more than {most}")


def count(shape: tuple[int, ...]) -> int:
    """How many numbers a tensor of this shape holds."""
    return math.prod(shape)


def check_settings(config: dict[str, Any]) -> None:
    """Refuse settings that name code or paths to load, or that would take absurd memory."""
    for key in _CODE_KEYS:
        if config.get(key):
            raise ValueError(f"it sets {key}={config[key]!r}; code or classes of a repo are never loaded")
    mapping = config.get("auto_mapping") or {}
    if not isinstance(mapping, dict):
        raise ValueError(f"auto_mapping must be a JSON object, got a {type(mapping).__name__}")
    library = mapping.get("parent_library") or "transformers"
    # the last is a script's own model; none of them is ever imported here
    if not re.fullmatch(r"transformers(\.models(\.\w+)*)?|(timm|open_clip)(\.\w+)*|__main__", str(library)):
        raise ValueError(
            f"auto_mapping names the module {library!r}, which is none of transformers, timm and OpenCLIP; where you "
            "trust the adapter, take auto_mapping out"
        )
    for key in ("base_model_name_or_path", "revision"):
        if not isinstance(config.get(key), (str, type(None))):
            raise ValueError(f"{key} must be a string, got {config[key]!r}")
        check_file_name(config.get(key) or "", key)
    for key, value in config.items():
        if not _FREE_SETTINGS.search(key):
            _check_sizes(key, value, _MAX_LONG_SETTING if key in _LONG_SETTINGS else MAX_SIZE_SETTING)


def check_file_name(name: str, what: str) -> None:
    """Refuse a name that the system would not look for as a folder."""
    longest = max(len(part.encode("utf-8", "surrogatepass")) for part in name.split("/"))
    if longest > 255 or len(name) > 2000 or "\0" in name:
        raise ValueError(f"{what} is no name of a folder or a repo: {name[:80]!r}... ({len(name)} characters)")


def check_pattern(pattern: str) -> str:
    """A regular expression that cannot take exponential time: short, few quantifiers, none of them after a group."""
    quantifiers = re.findall(r"(?<!\\)[*+?{]", pattern)
    if len(pattern) > 200 or len(quantifiers) > 4 or re.search(r"(?<!\\)\)[*+?{]", pattern):
        shown = pattern if len(pattern) <= 200 else pattern[:200] + "..."
        raise ValueError(f"the pattern {shown!r} could take forever; write the modules' names out")
    re.compile(pattern)
    return pattern


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key[:200]!r} appears twice")
        result[key] = value
    return result


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def checked_shape(key: str, shape: Any) -> tuple[int, ...]:
    """The shape that a header gives a tensor, where it is one of a size that may be."""
    if not _whole_numbers(shape):
        raise ValueError(f"{key[:200]} has no shape of whole numbers")
    shape, least = tuple(shape), 0 if _MAY_BE_EMPTY.fullmatch(key) else 1
    if len(shape) > 8 or any(size < least for size in shape):
        raise ValueError(f"{key[:200]} has the impossible shape {shape[:9]}")
    if count(shape) * _BYTES_PER_NUMBER > MAX_TENSOR_BYTES:
        raise ValueError(f"{key[:200]} has shape {shape}, more than 2 GiB as float32")
    return shape


def _check_sizes(key: str, value: Any, most: int) -> None:
    if isinstance(value, (int, float)) and abs(value) > most:
        raise ValueError(f"{key} is {value}, which is beyond {most}")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_sizes(key, inner, most)
