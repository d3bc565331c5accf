"""Ways to use a pool without tuning, the baselines of a meta-LoRA: peers, one a file, on the base in `base.py`."""

from .arrow import Arrow
from .average import Average
from .base import Merge, MergingMethod, Selection
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
    "shuffled_heads",
    "tuning_free_methods",
]
