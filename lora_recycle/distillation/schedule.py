"""Step sizes over the steps of a run."""

from __future__ import annotations

import math

from .config import DistillationConfig


def learning_rate(config: DistillationConfig, step: int) -> float:
    """Step size at `step` (from 0): cosine with 5 % warm-up, or the paper's cycles of 25 + 75 steps."""
    if config.schedule == "cyclic":
        position = step % 100
        if position < 25:
            return 1e-5 + (config.lr - 1e-5) * position / 25
        return config.lr * (0.5 + 0.5 * math.cos(math.pi * (position - 25) / 75))
    warmup = max(1, round(0.05 * config.steps))
    rise = min(1.0, (step + 1) / warmup)
    return config.lr * rise * (0.5 + 0.5 * math.cos(math.pi * step / config.steps))
