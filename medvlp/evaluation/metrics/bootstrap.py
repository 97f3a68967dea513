"""95 % intervals by resampling patients: images of one patient are not independent, so they go together."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

Floats = NDArray[np.float64]
#: Maps weights [R, N] (how often each sample is in each resample) to R values of a metric.
Statistic = Callable[[Floats], Floats]

#: Weights held at a time (32 MB), so that a large split needs no more memory than a small one.
_CELLS = 1 << 22


@dataclass(frozen=True)
class Estimate:
    """A metric with its 95 % interval (percentile bootstrap); `low` and `high` are None without resamples."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Resampled(Estimate):
    """An estimate with its values [R] in the resamples, NaN where undefined; two estimates of the same
    resamples have a difference with an interval of its own (`paired`)."""

    draws: Floats = field(default_factory=lambda: np.empty(0), compare=False, repr=False)


def estimate(value: float, draws: Floats) -> Estimate:
    """`value` with the 2.5 and 97.5 percentiles of `draws`; draws that are NaN (undefined) do not count."""
    defined = draws[~np.isnan(draws)]
    if not len(defined):
        return Estimate(float(value))
    low, high = np.percentile(defined, [2.5, 97.5])
    return Resampled(float(value), float(low), float(high), draws)


class PatientBootstrap:
    """Resamples of the patients of a split, the same ones for every metric and model (so they are paired).

    Attributes:
        fingerprint: equal where the resamples are: of the same patients, as many, with the same seed.
    """

    def __init__(self, patients: Sequence[str] | NDArray[Any], resamples: int, seed: int):
        """`patients` [N] names the patient of each sample; `resamples` may be 0 (no intervals)."""
        names, self._patient = np.unique(np.asarray(patients), return_inverse=True)
        self.patients = len(names)
        self.samples = len(self._patient)
        self.resamples = resamples
        draws = np.random.default_rng(seed).integers(0, max(self.patients, 1), (resamples, self.patients))
        rows = np.arange(resamples)[:, None] * self.patients
        counts = np.bincount((draws + rows).ravel(), minlength=resamples * self.patients)
        self._counts = counts.reshape(resamples, self.patients).astype(np.uint16)
        drawn = json.dumps([resamples, seed, *names.astype(str).tolist()])
        self.fingerprint = xxhash.xxh3_128_hexdigest(drawn.encode())

    def draws(self, statistic: Statistic, rows: NDArray[Any] | None = None) -> Floats:
        """[resamples] values of `statistic`.

        Args:
            statistic: function of the weights [R, n] of the samples, called for a few resamples at a time.
            rows: [n] positions of the samples it is about (default: all N). Patients are drawn from the
                whole split all the same.
        """
        patient = self._patient if rows is None else self._patient[rows]
        chunk = max(1, _CELLS // max(len(patient), 1))
        values = [
            statistic(self._counts[start : start + chunk][:, patient].astype(np.float64))
            for start in range(0, self.resamples, chunk)
        ]
        return np.concatenate(values) if values else np.empty(0)

    def estimate(self, statistic: Statistic, rows: NDArray[Any] | None = None) -> Estimate:
        """The statistic on the samples as they are, with its interval."""
        count = self.samples if rows is None else len(rows)
        return estimate(float(statistic(np.ones((1, count)))[0]), self.draws(statistic, rows))


@dataclass
class Macro:
    """Mean of a metric over findings; in a resample, over those findings for which it is defined there."""

    _values: list[float] = field(default_factory=list)
    _draws: list[Floats] = field(default_factory=list)

    def add(self, value: float, draws: Floats) -> None:
        """Add a finding: its value and its [R] values in the resamples (the same ones for all findings)."""
        self._values.append(value)
        self._draws.append(draws)

    def estimate(self) -> Estimate:
        """The mean over the findings added, with its interval."""
        draws = np.stack(self._draws)
        defined = ~np.isnan(draws)
        count = defined.sum(axis=0)
        total = np.where(defined, draws, 0).sum(axis=0)
        mean = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
        return estimate(float(np.mean(self._values)), mean)
