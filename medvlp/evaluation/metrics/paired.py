"""What one way of training does better than another, by patient and seed.

Two things make a difference uncertain: which patients are measured, and where training happened to start.
Patients are resampled, the same ones on both sides and for all seeds, so that what is hard for both cancels.
Starts are too few to be resampled: three give back one of them alone in every ninth resample, and the
percentiles exclude 0 in about every fourth study of two ways that are equal. Their spread therefore counts
through Student's t.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from medvlp.evaluation.metrics.bootstrap import Estimate, estimate

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Difference(Estimate):
    """A mean difference with its 95 % interval; of one seed the interval is over patients alone.

    Attributes:
        seeds: pairs of runs it is the mean of.
    """

    seeds: int = 1

    @property
    def claimed(self) -> bool:
        """Whether the interval excludes 0; never of one seed, which cannot tell what another would give."""
        if self.seeds < 2 or self.low is None or self.high is None:
            return False
        return self.low > 0 or self.high < 0


def paired_difference(ours: Floats, theirs: Floats, ours_drawn: Floats, theirs_drawn: Floats) -> Difference:
    """The mean over S seeds of ours minus theirs.

    The variance is that of the mean over patients (from R resamples, the seeds as they are) plus that over
    seeds (from their spread, a part of which patients make too, so the interval is rather too wide).
    Student's t has the degrees of freedom of Welch and Satterthwaite: S - 1 where seeds make the spread, many
    where patients do.

    Args:
        ours, theirs: [S] values of a metric; number s of both has the same seed.
        ours_drawn, theirs_drawn: [S, R] their values in the resamples, the same ones in all; NaN where
            undefined: the resample does not count.
    """
    differences, drawn = ours - theirs, (ours_drawn - theirs_drawn).mean(axis=0)
    value, seeds = float(differences.mean()), len(differences)
    drawn = drawn[~np.isnan(drawn)]
    if len(drawn) < 2 or np.isnan(value):
        return Difference(value, seeds=seeds)
    if seeds == 1:
        of_patients = estimate(value, drawn)
        return Difference(value, of_patients.low, of_patients.high, seeds)
    by_patient, by_seed = float(drawn.var(ddof=1)), float(differences.var(ddof=1)) / seeds
    total = by_patient + by_seed
    freedom = (seeds - 1) * (total / by_seed) ** 2 if by_seed > 0 else np.inf
    half = float(stats.t.ppf(0.975, freedom)) * total**0.5
    return Difference(value, value - half, value + half, seeds)
