"""Settings of an evaluation: the episodes, and the methods that are compared on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from ..errors import ConfigError
from ..runtime.config import RecipeConfig, field


#: Prototypes on the bare backbone: options of `prototype_accuracy`. All else is compared with `frozen`.
FROZEN_METHODS: dict[str, dict[str, Any]] = {
    "frozen": {},
    "frozen-centred": {"centred": True},
    "frozen-euclidean": {"metric": "euclidean"},
}
DEFAULT_METHODS = ("frozen-centred", "average", "ensemble", "random")


def all_methods() -> tuple[str, ...]:
    """Names of all methods that need no tuning, but for the meta-LoRA itself."""
    from ..merging import tuning_free_methods  # takes seconds, and the command line needs only the settings

    return (*FROZEN_METHODS, *tuning_free_methods())


def check_scales(methods: Iterable[str]) -> None:
    """Raise `ConfigError` where a method that is named with a scale, as in `ties:0.3`, cannot have it."""
    for name in methods:
        if ":" in name:
            from ..merging import make_method  # as above

            make_method(name)


@dataclasses.dataclass
class EpisodeConfig(RecipeConfig):
    """The few-shot tasks of an evaluation, the same for every method."""

    ways: int = field(5, "classes per episode")
    shots: tuple[int, ...] = field((1, 5), "support images per class; every method runs with each number")
    queries: int = field(15, "query images per class; fewer if a class has fewer")
    episodes: int = field(600, "episodes to average over")
    seed: int = field(0, "seed of the episodes, of the images sampled by max_per_class, and of random methods")

    def check(self) -> None:
        self.require(bool(self.shots) and min(self.shots) >= 1, f"shots must be at least 1, got {self.shots}")
        self.require(self.ways >= 2, f"ways must be at least 2, got {self.ways}")
        self.require(self.queries >= 1, f"queries must be at least 1, got {self.queries}")
        self.require(self.episodes >= 2, f"an interval needs at least 2 episodes, got {self.episodes}")


@dataclasses.dataclass
class EvaluationConfig(EpisodeConfig):
    """What [`evaluate`] compares, and on what."""

    methods: tuple[str, ...] = field(
        (),
        "methods to evaluate besides frozen and the meta-LoRA, or all; by default frozen-centred and, with a pool, "
        "average, ensemble, random; NAME:SCALE multiplies a merge, as in ties:0.3",
    )
    heads: tuple[str, ...] = field((), "few-shot heads to evaluate as well, on the frozen backbone and the meta-LoRA")
    max_per_class: int | None = field(None, "use at most this many images per class")
    batch_size: int = field(128, "images per forward pass")

    def check(self) -> None:
        super().check()
        self.require(
            self.max_per_class is None or self.max_per_class >= 1,
            f"max_per_class must be at least 1, got {self.max_per_class}",
        )
        self.require(self.batch_size >= 1, f"batch_size must be at least 1, got {self.batch_size}")

    def chosen_methods(self, has_pool: bool) -> list[str]:
        """Names of the methods that run beside `frozen` and the meta-LoRA.

        Raises:
            ConfigError: an unknown method, or one that needs a pool where there is none.
        """
        known = all_methods()
        if unknown := [name for name in self.methods if name.partition(":")[0] not in (*known, "all")]:
            raise ConfigError(f"there is no method {unknown[0]!r}; there are {', '.join(known)}.")
        check_scales(self.methods)
        if not self.methods:
            return [name for name in DEFAULT_METHODS if has_pool or name in FROZEN_METHODS]
        names = known if "all" in self.methods else self.methods
        if missing := [name for name in names if not has_pool and name not in FROZEN_METHODS]:
            raise ConfigError(f"{missing[0]} needs a pool of adapters: pass one (--pool), or leave the method out.")
        return [name for name in dict.fromkeys(names) if name != "frozen"]
