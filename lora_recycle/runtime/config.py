"""One dataclass is the Python argument, the YAML recipe and the command-line flags of a stage."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import yaml

from ..errors import ConfigError, first_line


if TYPE_CHECKING:
    from typing_extensions import Self  # of typing itself from Python 3.11 on


#: Counts and seeds beyond it fit no tensor.
_MOST = 2**63 - 1


@dataclasses.dataclass
class RecipeConfig:
    """Base of the configs: checked at construction, read from and written to plain dictionaries and YAML files.

    A subclass lists its fields with `field(default, "help text")` and checks ranges in `check`.
    """

    #: Settings that earlier versions wrote and this one has not, with the values that changed nothing; None: any.
    retired: ClassVar[Mapping[str, tuple | None]] = {}

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for f in dataclasses.fields(self):
            setattr(self, f.name, _coerce(getattr(self, f.name), hints[f.name], f"{type(self).__name__}.{f.name}"))
        self.check()

    def check(self) -> None:
        """Raise `ConfigError` where a value is out of range."""

    def require(self, condition: bool, message: str) -> None:
        if not condition:
            raise ConfigError(f"{type(self).__name__}: {message}")

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "the recipe") -> Self:
        """From a recipe or a file of an earlier version.

        Raises:
            ConfigError: an unknown key, a setting that was removed, or a value out of range.
        """
        names = [f.name for f in dataclasses.fields(cls)]
        for name, neutral in cls.retired.items():
            if neutral is not None and values.get(name, neutral[0]) not in neutral:
                raise ConfigError(f"{where}: {name} was removed, as it made results worse. Leave it out.")
        values = {key: value for key, value in values.items() if key not in cls.retired}
        unknown = sorted(set(values) - set(names), key=str)
        if unknown:
            raise ConfigError(
                f"{where}: unknown key {unknown[0]!r} for {cls.__name__}. Known keys: {', '.join(names)}."
            )
        return cls(**values)

    @classmethod
    def of(cls, given: Self | Mapping[str, Any] | None) -> Self:
        """A config as users hand it over: one, a dictionary of its settings, or None for the defaults.

        Raises:
            ConfigError: as `from_dict`, or something else.
        """
        if given is None or isinstance(given, Mapping):
            return cls.from_dict(dict(given or {}), cls.__name__)
        if not isinstance(given, cls):
            raise ConfigError(f"config must be {cls.__name__} or a dictionary, got a {type(given).__name__}.")
        return given

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        return cls.from_dict(read_yaml(path), where=str(path))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def field(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    """A dataclass field with its documentation and, for strings, the values allowed."""
    metadata = {"help": help, "choices": choices}
    if isinstance(default, (dict, list)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def require_choices(config: RecipeConfig) -> None:
    """Raise `ConfigError` where a field with `choices` holds something else."""
    for f in dataclasses.fields(config):
        choices, value = f.metadata.get("choices"), getattr(config, f.name)
        if choices and value is not None and value not in choices:
            config.require(False, f"{f.name} must be one of {', '.join(choices)}, got {value!r}")


def differences(there: dict[str, Any], here: dict[str, Any]) -> str:
    """What two recipes disagree about, the first few keys: "lr: 0.1 there, 0.2 here"."""
    changes = [
        f"{key}: {there.get(key)!r} there, {here.get(key)!r} here"
        for key in dict.fromkeys([*there, *here])
        if there.get(key) != here.get(key)
    ]
    return "; ".join(changes[:4]) + (f"; and {len(changes) - 4} more" if len(changes) > 4 else "")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises `ConfigError` where it is missing, unreadable or no mapping."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}).") from error
    except (
        yaml.YAMLError,
        ValueError,
        RecursionError,
    ) as error:  # brackets nested a thousand deep, dates, long numbers
        raise ConfigError(f"{path}: not valid YAML ({first_line(error)}).") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of settings, got a {type(values).__name__}.")
    return values


def _key(key: Any, hint: type, where: str) -> Any:
    """A key of a mapping: JSON and the command line make a string of a number."""
    try:
        return hint(key)
    except (ValueError, OverflowError):
        raise ConfigError(f"{where}: expected {hint.__name__} as key, got {key!r}.") from None


def _coerce(value: Any, hint: Any, where: str) -> Any:
    """Accept what YAML and the command line give for `hint`; raise `ConfigError` otherwise."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _coerce(value, next(a for a in arguments if a is not type(None)), where)
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_coerce(v, arguments[0], where) for v in value)
    if origin is dict and isinstance(value, dict):
        return {_key(k, arguments[0], where): _coerce(v, arguments[1], where) for k, v in value.items()}
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-3 as a string
        except (ValueError, OverflowError):
            pass
    elif hint is int and isinstance(value, float) and value.is_integer():
        return _coerce(int(value), hint, where)
    elif hint is int and isinstance(value, int) and abs(value) > _MOST:
        raise ConfigError(
            f"{where}: must lie between -{_MOST} and {_MOST}, got a number of {value.bit_length()} bits."
        )
    elif origin is None and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    if isinstance(value, float) and hint is float:
        return value
    name = getattr(hint, "__name__", str(hint))
    raise ConfigError(f"{where}: expected {name}, got {value!r}.")
