"""Config dataclasses as command-line flags: defaults, then the recipe file, then the flags that were given."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Callable
from typing import Any, TypeVar

from ..errors import ConfigError
from ..runtime.config import RecipeConfig, read_yaml


#: Verbs that have settings. A recipe may hold one section for each.
SECTIONS = ("train-adapters", "invert", "distill", "evaluate")

Config = TypeVar("Config", bound=RecipeConfig)


def add_config_arguments(parser: argparse.ArgumentParser, config_class: type[RecipeConfig]) -> None:
    """Give `parser` one flag for each field of `config_class`, and `--recipe`.

    Flags that are not given leave no trace in the namespace, so that they do not override the recipe.
    """
    group = parser.add_argument_group("settings", "a flag overrides the same key of --recipe")
    group.add_argument("--recipe", metavar="FILE", help="YAML file of settings, flat or in sections named after verbs")
    hints = typing.get_type_hints(config_class)
    for f in dataclasses.fields(config_class):
        group.add_argument(
            f"--{f.name.replace('_', '-')}",
            dest=f.name,
            default=argparse.SUPPRESS,
            help=f"{f.metadata['help']} (default: {_shown(_default(f))})".replace("%", "%%"),
            **_flag(hints[f.name], f.metadata.get("choices")),
        )


def build_config(args: argparse.Namespace, config_class: type[Config]) -> Config:
    """The config that the command line asks for.

    Raises:
        ConfigError: a recipe that cannot be read, an unknown key, or a value out of range.
    """
    values, where = {}, "the command line"
    if args.recipe:
        where = args.recipe
        values = read_section(args.recipe, args.verb)
    names = {f.name for f in dataclasses.fields(config_class)}
    given = {name: value for name, value in vars(args).items() if name in names}
    given = {name: dict(value) if _is_pairs(value) else value for name, value in given.items()}
    return config_class.from_dict({**values, **given}, where=str(where))


def read_section(path: str, verb: str) -> dict[str, Any]:
    """The settings of `verb` in a recipe: the whole of a flat file, or the verb's section of a file with sections.

    Raises:
        ConfigError: the file is missing or unreadable, mixes keys and sections, or lacks the section.
    """
    values = read_yaml(path)
    if not set(values) & set(SECTIONS):
        return values
    unknown = sorted(str(key) for key in set(values) - set(SECTIONS))
    if unknown:
        raise ConfigError(f"{path}: unknown key {unknown[0]!r} beside sections. Sections are {', '.join(SECTIONS)}.")
    if verb not in values:
        raise ConfigError(f"{path}: has no section `{verb}:`, only {', '.join(values)}.")
    section = {} if values[verb] is None else values[verb]
    if not isinstance(section, dict):
        raise ConfigError(f"{path}: section `{verb}:` must be a mapping of settings, got {section!r}.")
    return section


def _flag(hint: Any, choices: tuple[str, ...] | None) -> dict[str, Any]:
    """What `add_argument` needs for a field of this type."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        inner = next(a for a in typing.get_args(hint) if a is not type(None))
        return {"type": _or_none(inner), "metavar": _metavar(inner)}
    if typing.get_origin(hint) is tuple:
        return {"type": typing.get_args(hint)[0], "nargs": "+", "metavar": _metavar(typing.get_args(hint)[0])}
    if typing.get_origin(hint) is dict:
        return {"type": _pair, "nargs": "*", "metavar": "NAME=NUMBER"}
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if choices:
        return {"type": hint, "choices": choices}
    return {"type": hint, "metavar": _metavar(hint)}


def _metavar(hint: type) -> str:
    return {int: "N", float: "X"}.get(hint, "TEXT")


def _or_none(inner: type) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        return None if text.lower() == "none" else inner(text)

    convert.__name__ = f"{inner.__name__} or none"  # argparse names the type in its errors
    return convert


def _pair(text: str) -> tuple[str, float]:
    name, equals, number = text.partition("=")
    try:
        if not (name and equals):
            raise ValueError
        return name, float(number)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected NAME=NUMBER, as in tv=0.1, got {text!r}") from None


def _is_pairs(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, tuple) for item in value)


def _default(f: dataclasses.Field) -> Any:
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key}={number:g}" for key, number in value.items()) or "none"
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value is None else str(value)
