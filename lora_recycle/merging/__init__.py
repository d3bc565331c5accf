"""Ways to use a pool without tuning, the rivals of a meta-LoRA: peers, one a file, on the base in `base.py`."""

from .arrow import Arrow
from .base import Composition, Merge, Selection
from .class_statistics import ClassStatistics
from .controls import RandomAverage, shuffled_heads
from .dare import Dare
from .ensemble import Ensemble
from .groups import GroupSum, NearestGroup, Restored, Undiluted, separability
from .knots import Knots
from .magnitude import MagnitudePruning
from .ties import Ties
from .uniform import Uniform


def tuning_free_methods(seed: int = 0) -> dict[str, Composition]:
    """The compositions that `evaluate` offers, by name. `seed` is of those that draw at random."""
    return {
        "average": Uniform(),
        "average-rank-16": Uniform(rank=16),
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


__all__ = [
    "Arrow",
    "ClassStatistics",
    "Composition",
    "Dare",
    "Ensemble",
    "GroupSum",
    "Knots",
    "MagnitudePruning",
    "Merge",
    "NearestGroup",
    "RandomAverage",
    "Restored",
    "Selection",
    "Ties",
    "Undiluted",
    "Uniform",
    "separability",
    "shuffled_heads",
    "tuning_free_methods",
]
