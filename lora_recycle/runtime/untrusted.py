"""JSON, the front matter of cards and settings that anyone may have written, parsed with limits.

Every function raises `ValueError` with the reason; the callers say in which repo and file. What is read is bounded
before it is parsed (bytes, number of values) and before it is used (depth, sizes), so that a small file costs neither
minutes nor gigabytes.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

import yaml

from .untrusted_files import check_file_name


#: Of JSON and YAML: values in all, and how deep lists and objects lie in each other.
MAX_VALUES, MAX_DEPTH = 500_000, 50
#: Of a card: its text, its front matter (PyYAML takes 20 s for a megabyte), and values there.
MAX_CARD_BYTES, MAX_FRONT_MATTER, MAX_CARD_VALUES, MAX_CARD_DEPTH = 1024**2, 128 * 1024, 20_000, 20
#: Upper bound of ranks, numbers of blocks and the like, which PEFT turns into memory and loops.
MAX_SIZE_SETTING = 4096
_MAX_LONG_SETTING = 2**24
_LONG_SETTINGS = ("n_frequency", "theta_d_length")
_FREE_SETTINGS = re.compile(r"seed|key|alpha|lambda|step|warmup|interval|t?init$|t?final$|delta|layers_to_transform")
# keys with which transformers and diffusers find code in a repo
_CODE_KEYS = ("auto_map", "trust_remote_code", "custom_pipeline", "custom_pipelines", "_class_name")


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


def _check_sizes(key: str, value: Any, most: int) -> None:
    if isinstance(value, (int, float)) and abs(value) > most:
        raise ValueError(f"{key} is {value}, which is beyond {most}")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_sizes(key, inner, most)
