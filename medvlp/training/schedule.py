"""Schedules as arrays indexed by step, so that resuming needs nothing but the step."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from medvlp.config import Config, PhaseConfig


class Schedule(NamedTuple):
    """What the optimiser does at every step.

    Attributes:
        rates: [steps] learning rate, before the factors of parameter groups.
        phases: [steps] number of the optimiser phase, from 0; the optimiser starts afresh where it rises.
    """

    rates: NDArray[np.float64]
    phases: NDArray[np.int64]

    @property
    def steps(self) -> int:
        """Steps of the run."""
        return len(self.rates)

    def restarts_at(self, step: int) -> bool:
        """Whether the step after `step` finished ones is the first of a phase other than the run's first."""
        return step > 0 and bool(self.phases[step] != self.phases[step - 1])


def build_schedule(config: Config, steps_per_epoch: int) -> Schedule:
    """The schedule that `optimizer` and the run's length describe.

    Args:
        config: of the run.
        steps_per_epoch: optimiser steps of a pass over the split.
    """
    optimizer = config.optimizer
    if optimizer.phases:
        parts = [phase_rates(phase, steps_per_epoch) for phase in optimizer.phases]
        numbers = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        return Schedule(np.concatenate(parts), numbers)
    steps = total_steps(config, steps_per_epoch)
    warmup = warmup_steps(config, steps)
    if optimizer.schedule == "epoch_cosine":
        stair = optimizer.warmup_stair
        rates = epoch_cosine(steps, steps_per_epoch, warmup, stair, optimizer.lr, optimizer.min_lr)
    elif optimizer.schedule == "constant":
        rates = warmup_constant(steps, warmup, optimizer.lr, optimizer.min_lr)
    else:
        rates = warmup_cosine(steps, warmup, optimizer.lr, optimizer.min_lr)
    return Schedule(rates, np.zeros(steps, dtype=np.int64))


def total_steps(config: Config, steps_per_epoch: int) -> int:
    """Optimiser steps of the run: all phases, else `train.steps`, else `train.epochs` (at least
    one step, and `train.min_steps`)."""
    if config.optimizer.phases:
        return sum(_steps(phase.epochs, steps_per_epoch) for phase in config.optimizer.phases)
    if config.train.steps is not None:
        return config.train.steps
    return max(_steps(config.train.epochs, steps_per_epoch), config.train.min_steps)


def _steps(epochs: float, steps_per_epoch: int) -> int:
    return max(1, round(epochs * steps_per_epoch))


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
    return np.where(step < warmup, rising, _half_cosine(step - warmup, steps - warmup, peak, low))


def warmup_constant(steps: int, warmup: int, peak: float, low: float) -> NDArray[np.float64]:
    """Learning rate of each step: linear from `low` to `peak` in `warmup` steps, then `peak`; [steps]."""
    step = np.arange(steps, dtype=np.float64)
    return np.where(step < warmup, low + (peak - low) * step / max(warmup, 1), peak)


def phase_rates(phase: PhaseConfig, steps_per_epoch: int) -> NDArray[np.float64]:
    """Learning rate of each step of one phase: linear to the peak, then half a cosine towards `min_lr`.

    Source: PRIOR's published schedule. Unlike in `warmup_cosine`, the last step of the warm-up is at the peak
    already, and so is the step after it; a warm-up of a single step stands at `start_lr`.

    Args:
        phase: its learning rates and lengths.
        steps_per_epoch: optimiser steps of a pass over the split.

    Returns:
        [steps of the phase] values.
    """
    steps = _steps(phase.epochs, steps_per_epoch)
    warmup = round(phase.warmup_epochs * steps_per_epoch)
    step = np.arange(steps, dtype=np.float64)
    rising = phase.start_lr + (phase.lr - phase.start_lr) * step / max(warmup - 1, 1)
    falling = _half_cosine(step - warmup, steps - warmup, phase.lr, phase.min_lr)
    return np.where(step < warmup, rising, falling)


def epoch_cosine(
    steps: int, steps_per_epoch: int, warmup: int, stair: int, peak: float, low: float
) -> NDArray[np.float64]:
    """Learning rate of each step: a warm-up inside epoch 0, then one value of half a cosine for each epoch.

    Source: MeDSLIP's published schedule (`stair` 100, `warmup` 500), whose epoch 1 follows the cosine as if
    epoch 0 had, too.

    Args:
        steps: steps of the run.
        steps_per_epoch: steps that share a value.
        warmup: steps of the rise from `low` to `peak`; what would lie beyond epoch 0 is cut off.
        stair: steps of the warm-up with the same value.
        peak, low: largest and smallest learning rate.

    Returns:
        [steps] values.
    """
    step = np.arange(steps)
    epoch = step // steps_per_epoch
    rising = low + (peak - low) * (step // stair * stair) / max(warmup, 1)
    falling = _half_cosine(epoch.astype(np.float64), steps / steps_per_epoch, peak, low)
    return np.where((epoch == 0) & (step < warmup), rising, falling)


def _half_cosine(
    position: NDArray[np.float64], length: float, peak: float, low: float
) -> NDArray[np.float64]:
    return low + (peak - low) * (1 + np.cos(np.pi * position / max(length, 1))) / 2
