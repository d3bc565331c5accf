"""Steps whose loss is not to be trusted: found on the device, without waiting for it."""

from __future__ import annotations

import torch

from ..errors import DataError
from .config import DistillationConfig


#: Losses that the median is of, and how many there must be before it counts.
WINDOW, ENOUGH = 50, 10
#: Steps in a row that may be left out before training stops.
MOST_IN_A_ROW = 5


class SpikeGuard:
    """Tells which steps to leave out: those whose loss is not finite, or more than `factor` times the median of the
    last 50 losses.

    Args:
        factor (`float`): 0 leaves out only what is not finite.
        device: where the losses are.
    """

    def __init__(self, factor: float, device: torch.device | str = "cpu"):
        self.factor, self.seen = factor, 0
        self._recent = torch.full((WINDOW,), torch.nan, device=device)

    def __call__(self, loss: torch.Tensor) -> torch.Tensor:
        """Whether the step with this loss, a scalar, is to be left out: bool, on the device."""
        spike = ~loss.isfinite()
        if self.factor:
            enough = self._recent.isfinite().sum() >= ENOUGH
            spike = spike | (enough & (loss > self.factor * self._recent.nanmedian()))
        self._recent[self.seen % WINDOW] = loss.masked_fill(spike, torch.nan)
        self.seen += 1
        return spike

    def replay(self, losses: list[torch.Tensor]) -> list[int]:
        """Be as after these losses, so that a resumed run judges as an undisturbed one; return which were spikes."""
        device, self._recent = self._recent.device, self._recent.cpu()
        spikes = [step for step, loss in enumerate(losses) if self(loss)]
        self._recent = self._recent.to(device)
        return spikes


def longest_tail(skipped: list[int], step: int) -> int:
    """How many of the steps up to `step`, the last one included, were left out without a break."""
    count = 0
    while count < len(skipped) and skipped[-1 - count] == step - count:
        count += 1
    return count


def refuse_too_many(skipped: list[int], loss: float, config: DistillationConfig) -> None:
    """Raise `DataError` where the last step of `skipped`, whose loss this is, ends `MOST_IN_A_ROW` or more."""
    if (count := longest_tail(skipped, skipped[-1])) >= MOST_IN_A_ROW:
        raise DataError(
            f"The loss is {loss:.6g} at step {skipped[-1]}: lower `lr` (now {config.lr}). The last {count} steps "
            "were left out, for losses or gradients that are not finite or losses above `spike_factor` "
            f"({config.spike_factor:g}) times their median; the last checkpoint is of before."
        )
