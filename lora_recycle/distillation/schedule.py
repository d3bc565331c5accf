"""Step sizes over the steps of a run."""

from __future__ import annotations

import math

from .config import DistillationConfig


#: The paper's cycle: steps of warm-up and of decay, and where it begins and ends, as a fraction of `lr`: 1e-5 of 1e-3.
WARMUP, DECAY, FLOOR = 25, 75, 0.01


def learning_rate(config: DistillationConfig, step: int) -> float:
    """Step size at `step` (from 0): cosine with 5 % warm-up, or the paper's cycles of 25 + 75 steps.

    A cycle rises from its floor, `lr` / 100, to `lr` and falls back to it by a cosine; the next begins there.
    """
    if config.schedule == "cyclic":
        position, floor = step % (WARMUP + DECAY), FLOOR * config.lr
        if position < WARMUP:
            return floor + (config.lr - floor) * position / WARMUP
        return floor + (config.lr - floor) * (0.5 + 0.5 * math.cos(math.pi * (position - WARMUP) / DECAY))
    warmup = max(1, round(0.05 * config.steps))
    rise = min(1.0, (step + 1) / warmup)
    return config.lr * rise * (0.5 + 0.5 * math.cos(math.pi * step / config.steps))
