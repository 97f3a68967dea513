"""Schedules as arrays indexed by step, so that resuming needs nothing but the step."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from medvlp.config import Config


def total_steps(config: Config, steps_per_epoch: int) -> int:
    """Optimiser steps of the run: `train.steps`, else `train.epochs` passes (at least one step)."""
    if config.train.steps is not None:
        return config.train.steps
    return max(1, round(config.train.epochs * steps_per_epoch))


def warmup_steps(config: Config, steps: int) -> int:
    """Steps of the warm-up: `optimizer.warmup_steps`, else the share `optimizer.warmup` of all steps."""
    if config.optimizer.warmup_steps is not None:
        return config.optimizer.warmup_steps
    return int(config.optimizer.warmup * steps)


def warmup_cosine(steps: int, warmup: int, peak: float, low: float) -> NDArray[np.float64]:
    """Learning rate of each step: linear from `low` to `peak`, then half a cosine back towards `low`.

    Source: MGCA's published schedule (its cycle is restarted after the last step; a run here ends there).

    Args:
        steps: steps of the run.
        warmup: steps of the rise; a run that is shorter ends before the peak.
        peak, low: largest and smallest learning rate.

    Returns:
        [steps] values; step 0 is `low` when there is a warm-up, else `peak`.
    """
    step = np.arange(steps, dtype=np.float64)
    rising = low + (peak - low) * step / max(warmup, 1)
    falling = low + (peak - low) * (1 + np.cos(np.pi * (step - warmup) / max(steps - warmup, 1))) / 2
    return np.where(step < warmup, rising, falling)
