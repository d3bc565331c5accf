"""What `lora-recycle benchmark` reads: data sets, pools and methods in one YAML file."""

from __future__ import annotations

import dataclasses
import fnmatch
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..fewshot.heads import HEADS
from ..finetuning import TaskTuningConfig, tuning_methods
from ..merging import tuning_free_methods
from ..runtime.config import RecipeConfig, field, read_yaml
from .config import FROZEN_METHODS, EpisodeConfig, check_scales


#: Ends the name of a meta-LoRA that is tuned on each support set.
TUNED = "-tuned"
#: Behind the name of a meta-LoRA that has experts: its shared network alone, whatever a task would choose.
STATIC = "-shared"
_SECTIONS = ("data", "pools", "tuning")


@dataclasses.dataclass
class DataSpec(RecipeConfig):
    """Labelled images of classes that no adapter has seen."""

    path: str = field("", "parquet file, folder or Hub id; looked for in the data root first")
    split: str | None = field(None, "split of a folder or Hub data set")
    max_per_class: int | None = field(None, "use at most this many images per class")
    without_classes: tuple[str, ...] = field((), "names of classes to leave out, as those that an adapter knows")
    without_images: tuple[int, ...] = field((), "numbers of images to leave out, from 0, as those seen in training")

    def check(self) -> None:
        self.require(bool(self.path), "each data set needs a path")
        self.require(self.max_per_class is None or self.max_per_class >= 1, "max_per_class must be at least 1")

    def location(self, root: Path | None) -> str:
        """Where it is: below `root` where there is such a file or folder, else the path itself."""
        below = None if root is None else root / self.path
        return str(below) if below is not None and below.exists() else self.path


@dataclasses.dataclass
class PoolSpec(RecipeConfig):
    """Adapters, what was recycled from them, and the data sets that both are evaluated on."""

    adapters: tuple[str, ...] = field(("demo",), "sources of adapters, as --pool of other verbs accepts them")
    names: str = field("*", "only adapters whose name matches this pattern, as in cifar_fs-*")
    data: tuple[str, ...] = field((), "only data sets whose path matches one of these patterns; all by default")
    methods: tuple[str, ...] = field((), "only these of the recipe's methods, with frozen and average; all by default")
    meta_loras: dict[str, str] = field({}, "method name to folder or repo id of a meta-LoRA")
    base_model: str | None = field(
        None, "folder or repo id of the base model; by default the one that the adapters name"
    )

    def runs_on(self, data: DataSpec) -> bool:
        return not self.data or any(fnmatch.fnmatch(data.path, pattern) for pattern in self.data)


@dataclasses.dataclass
class BenchmarkConfig(EpisodeConfig):
    """The episodes of a benchmark, and the methods that are evaluated on them."""

    tuning_episodes: int = field(30, "episodes, the first of the same, for methods that tune the network")
    methods: tuple[str, ...] = field(("frozen", "average"), "methods by name; frozen and average are always included")

    def check(self) -> None:
        super().check()
        self.require(
            2 <= self.tuning_episodes <= self.episodes,
            f"tuning_episodes must be 2 to {self.episodes} (episodes), got {self.tuning_episodes}",
        )


@dataclasses.dataclass
class BenchmarkRecipe:
    """A recipe, checked: every name in it is known."""

    episodes: BenchmarkConfig
    data: list[DataSpec]
    pools: dict[str, PoolSpec]
    tuning: dict[str, dict[str, Any]]

    @classmethod
    def from_yaml(cls, path: str | Path) -> BenchmarkRecipe:
        """Read a recipe.

        Raises:
            ConfigError: a file that cannot be read, an unknown key or method, or a value out of range.
        """
        return cls.from_dict(read_yaml(path), str(path))

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "the recipe") -> BenchmarkRecipe:
        data, pools = values.get("data") or [], values.get("pools") or {}
        if not isinstance(data, list) or not data:
            raise ConfigError(f"{where}: `data:` must be a list of data sets, got {data!r}.")
        if not isinstance(pools, dict) or not pools:
            raise ConfigError(f"{where}: `pools:` must name at least one pool, got {pools!r}.")
        plain = {key: value for key, value in values.items() if key not in _SECTIONS}
        recipe = cls(
            BenchmarkConfig.from_dict(_with_tuples(plain), where),
            [DataSpec.from_dict(_with_tuples(_mapping(item, f"{where}: data")), f"{where}: data") for item in data],
            {name: _pool(name, spec, where) for name, spec in pools.items()},
            _mapping(values.get("tuning") or {}, f"{where}: tuning"),
        )
        recipe._check(where)
        return recipe

    @property
    def meta_loras(self) -> set[str]:
        return {name for pool in self.pools.values() for name in pool.meta_loras}

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.episodes.to_dict(),
            "data": [spec.to_dict() for spec in self.data],
            "pools": {name: spec.to_dict() for name, spec in self.pools.items()},
            "tuning": self.tuning,
        }

    def _check(self, where: str) -> None:
        baselines, tuned = set(tuning_free_methods()), set(tuning_methods())
        static = {name + STATIC for name in self.meta_loras}
        bases = {"frozen", *self.meta_loras, *static}
        taken = self.meta_loras & (baselines | tuned | set(FROZEN_METHODS))
        if taken:
            raise ConfigError(
                f"{where}: a meta-LoRA cannot be named {sorted(taken)[0]!r}, because a method has that name."
            )
        known = baselines | tuned | set(FROZEN_METHODS) | self.meta_loras | static
        known |= {name + TUNED for name in self.meta_loras}
        for name, pool in self.pools.items():
            if more := sorted(set(pool.methods) - {"frozen", "average", *self.episodes.methods}):
                raise ConfigError(f"{where}: pools: {name}: {more[0]!r} is not one of the recipe's methods.")
        for method in self.episodes.methods:
            base, plus, head = method.partition(" + ")
            unscaled, colon, _ = method.partition(":")
            if colon and unscaled in baselines:
                try:
                    check_scales([method])
                except ConfigError as error:
                    raise ConfigError(f"{where}: {error}") from error
            elif not (base in bases and head in HEADS if plus else method in known):
                raise ConfigError(
                    f"{where}: there is no method {method!r}. Methods are {', '.join(sorted(known))}, and with a head "
                    f"{', '.join(sorted(bases))}, as in `frozen + {next(iter(HEADS))}` (heads: {', '.join(HEADS)})."
                )
        for method, settings in self.tuning.items():
            if method not in known or (method not in tuned and not method.endswith(TUNED)):
                raise ConfigError(f"{where}: tuning: {method!r} does not tune.")
            TaskTuningConfig.from_dict(_mapping(settings, f"{where}: tuning: {method}"), f"{where}: tuning: {method}")


def _pool(name: str, spec: Any, where: str) -> PoolSpec:
    place = f"{where}: pools: {name}"
    return PoolSpec.from_dict(_with_tuples(_mapping(spec, place)), place)


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if isinstance(value, str) and where.endswith("data"):
        return {"path": value}
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: expected a mapping of settings, got {value!r}.")
    return value


def _with_tuples(values: dict[str, Any]) -> dict[str, Any]:
    """One value where several may stand is a list of one."""
    several = ("shots", "methods", "adapters", "data", "without_classes", "without_images")
    return {k: (v,) if k in several and isinstance(v, (str, int)) else v for k, v in values.items()}
