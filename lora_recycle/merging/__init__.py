"""Ways to use a pool without tuning, the baselines of a meta-LoRA: peers, one a file, on the base in `base.py`."""

import copy

from ..errors import ConfigError
from .arrow import Arrow
from .average import Average
from .base import Merge, MergingMethod, Selection, checked_scale
from .class_statistics import ClassStatistics
from .controls import RandomAverage, shuffled_heads
from .dare import Dare
from .ensemble import Ensemble
from .groups import GroupSum, NearestGroup, Restored, Undiluted
from .knots import Knots
from .magnitude import MagnitudePruning
from .ties import Ties


def tuning_free_methods(seed: int = 0) -> dict[str, MergingMethod]:
    """The merging_methods that `evaluate` offers, by name. `seed` is of those that draw at random."""
    return {
        "average": Average(),
        "average-rank-16": Average(rank=16),
        "ensemble": Ensemble(),
        "random": RandomAverage(seed),
        "magnitude": MagnitudePruning(),
        "dare": Dare(seed=seed),
        "ties": Ties(),
        "knots": Knots(),
        "undiluted": Undiluted(),
        "restored": Restored(),
        "group-sum": GroupSum(),
        "nearest-group": NearestGroup(),
        "class-statistics": ClassStatistics(),
        "arrow": Arrow(),
    }


def make_method(name: str, seed: int = 0) -> MergingMethod:
    """A method by its name, which may end in a scale (`ties`, `ties:0.3`), as on the command line and in recipes.

    Raises:
        ConfigError: an unknown name, a method that has no scale, or a scale that is not a positive number.
    """
    base, colon, given = name.partition(":")
    methods = tuning_free_methods(seed)
    if base not in methods:
        raise ConfigError(f"there is no method {name!r}; there are {', '.join(methods)}.")
    method = methods[base]
    if not colon:
        return method
    if not hasattr(method, "scale"):
        scaled = ", ".join(key for key, own in methods.items() if hasattr(own, "scale"))
        raise ConfigError(f"{name!r}: {base} has no scale; {scaled} have one.")
    try:
        scale = checked_scale(float(given))
    except (ValueError, ConfigError) as error:
        raise ConfigError(f"{name!r}: the scale must be a positive number, as in {base}:0.5.") from error
    method = copy.copy(method)
    method.scale = scale
    return method


__all__ = [
    "Arrow",
    "Average",
    "ClassStatistics",
    "Dare",
    "Ensemble",
    "GroupSum",
    "Knots",
    "MagnitudePruning",
    "Merge",
    "MergingMethod",
    "NearestGroup",
    "RandomAverage",
    "Restored",
    "Selection",
    "Ties",
    "Undiluted",
    "make_method",
    "shuffled_heads",
    "tuning_free_methods",
]
