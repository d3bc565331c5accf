"""Launches of several processes: commands, and how far their results may differ."""

import os
from pathlib import Path


LAUNCHED = Path(__file__).with_name("runtime") / "launched.py"
INVERT = ["--images-per-class", "6", "--iterations", "5", "--keep-ratio", "0.5", "--jitter", "0"]
DISTILL = ["--steps", "6", "--rank", "4", "--relational-batch", "16", "--save-steps", "3"]
DISTILL += ["--ways", "3", "--queries", "3", "--episodes", "2", "--kl-weight", "1", "--interpolation-weight", "1"]
DISTILL += ["--gradient-accumulation-steps", "2", "--max-grad-norm", "0.5", "--validation-fraction", "0"]
#: Weights of a few tenths are stored in float32, of which half of the last digit is 2**-26 there.
EXACT = 2**-24


def environment(**changes):
    packages = str(Path(__file__).parents[1])
    return os.environ | {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONPATH": packages} | changes


def distill(pool, surrogate, output, *more):
    return ["distill", str(pool), "--surrogate", str(surrogate), "--output", str(output), *DISTILL, *more]


def furthest(one, other):
    """The largest difference; of what was learnt in float64, that of the last digit as it is stored."""
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)
