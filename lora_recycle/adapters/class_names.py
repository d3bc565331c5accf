"""Class names that the user gives for adapters without a head."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError, first_line
from ..runtime.untrusted_files import read_text
from .pull import AdapterInfo


#: Class names of all adapters without a head, or of each by its name; or the text or file that says so.
ClassNames = str | Path | Sequence[str] | Mapping[str, Sequence[str]]
_FILES = (".txt", ".yaml", ".yml", ".json")


def name_classes(
    infos: Sequence[AdapterInfo], class_names: ClassNames | None, skipped: Iterable[str] = ()
) -> list[AdapterInfo]:
    """The adapters with `class_names` as `labels`, which go before those of a card.

    Args:
        class_names: a list of names for all adapters without a head, or a mapping from adapters (repo id or name of
            the folder) to lists. As text: names with commas between them, or a file: `.txt` with one name in each
            line, `.yaml` or `.json` with a list or a mapping.
        skipped: adapters that may be named though they are not in `infos`.

    Raises:
        ConfigError: no names, a name twice, or names for an adapter that is not there or has a head of its own.
    """
    if class_names is None:
        return list(infos)
    given = _read(class_names)
    if isinstance(given, Mapping):
        given = {adapter: _checked(names, f"class names of {adapter}") for adapter, names in given.items()}
        _check_adapters(given, infos, skipped)
    else:
        given = _checked(given, "class names")
    result = []
    for info in infos:
        names = given.get(info.where, given.get(info.name)) if isinstance(given, dict) else given
        unnamed = names is None or info.num_classes is not None
        result.append(info if unnamed else dataclasses.replace(info, labels=names))
    return result


def _read(class_names: ClassNames) -> Any:
    if not isinstance(class_names, (str, Path)):
        return class_names
    path = Path(class_names)
    if path.suffix not in _FILES:
        return [name.strip() for name in str(class_names).split(",")]
    try:
        text = read_text(path)
        if path.suffix == ".txt":
            return [line.strip() for line in text.splitlines() if line.strip()]
        return yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: no readable class names ({first_line(error)}).") from error


def _checked(names: Any, what: str) -> tuple[str, ...]:
    plain = isinstance(names, (list, tuple)) and names
    if not plain or not all(type(name) in (str, int, float) and str(name).strip() for name in names):
        raise ConfigError(
            f"{what}: expected a list of names (in YAML, words such as no in quotes), got {names!r:.200}."
        )
    names = tuple(str(name) for name in names)
    name, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise ConfigError(f"{what}: {name!r} is there twice.")
    return names


def _check_adapters(given: Mapping[str, Any], infos: Sequence[AdapterInfo], skipped: Iterable[str]) -> None:
    headed = {name for info in infos if info.num_classes is not None for name in (info.name, info.where)}
    bare = {name for info in infos if info.num_classes is None for name in (info.name, info.where)}
    gone = {form for name in skipped for form in (name, name.partition("@")[0], Path(name).name)}
    for adapter in given:
        if adapter in headed - bare:
            raise ConfigError(f"class names of {adapter}: it has a head of its own. Leave it out of the class names.")
        if adapter not in bare | gone:
            known = ", ".join(sorted({info.name for info in infos if info.num_classes is None})) or "there is none"
            raise ConfigError(f"class names of {adapter}: no such adapter here. Without a head: {known}.")
