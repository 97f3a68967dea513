"""Clinical efficacy: precision, recall and F1 of the findings that generated reports state.

Both sides are tables of labels (1 stated, 0 denied, -1 uncertain, NaN not mentioned) by any labeller, whose
columns are matched by name: labellers and datasets order the same 14 findings in four ways.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from medvlp.evaluation.metrics.bootstrap import Estimate, PatientBootstrap

Floats = NDArray[np.float64]
#: What uncertain labels count as: "exclude" leaves out what is uncertain in truth and takes an uncertain
#: statement for none; "positive" and "negative" are of both sides (R2Gen: negative).
Uncertain = Literal["exclude", "positive", "negative"]
#: What findings count as that the truth does not mention; statements that are not made are 0 always.
Blank = Literal["exclude", "negative"]
#: A report that has no finding in truth and states none: left out of the mean over reports, or right.
Empty = Literal["exclude", "one"]

METRICS = ("precision", "recall", "f1")


@dataclass(frozen=True)
class LabelTable:
    """Labels of N reports: `values` [N, C] hold 1, 0, -1 or NaN of the C findings `names`."""

    names: Sequence[str]
    values: Floats

    def columns(self, names: Sequence[str]) -> Floats:
        """[N, len(names)] the named columns, found by name whatever their case and their separators.

        Raises:
            ValueError: one of them is missing or stands twice.
        """
        own = [plain(name) for name in self.names]
        if twice := sorted({name for name in own if own.count(name) > 1}):
            raise ValueError(f"two columns are named {twice[0]!r}")
        if missing := [name for name in names if plain(name) not in own]:
            raise ValueError(f"no column is named {missing[0]!r}; there are {', '.join(self.names)}")
        return self.values[:, [own.index(plain(name)) for name in names]]


def plain(name: str) -> str:
    """A finding's name in one spelling: "Pleural_Effusion" and "pleural effusion" are the same."""
    return " ".join(name.replace("_", " ").replace("-", " ").casefold().split())


def clinical_efficacy(
    stated: LabelTable,
    truth: LabelTable,
    names: Sequence[str],
    bootstrap: PatientBootstrap,
    uncertain: Uncertain = "exclude",
    blank: Blank = "exclude",
    empty: Empty = "exclude",
) -> dict[str, Estimate]:
    """Precision, recall and F1 by finding and averaged in three ways.

    Args:
        stated: labels of the generated reports. truth: those they are compared with; N reports in one order.
        names: the findings that count, in both tables.
        bootstrap: resamples of the patients of the N reports.

    Returns:
        `<metric>/<average>`: "macro" is the mean over findings, "micro" pools all findings, "example" is the
        mean over reports; and `<metric>/<finding>`. A finding that is neither true nor stated in any report
        has no number and is not in "macro" (scikit-learn's default counts it as 0); one that is true and
        never stated has precision, recall and F1 of 0, as one that is stated and never true. Averages that
        have nothing to average are missing.

    Raises:
        ValueError: a column is missing or stands twice, or other numbers of reports.
    """
    if len(stated.values) != len(truth.values):
        raise ValueError(f"{len(stated.values)} labelled reports and {len(truth.values)} in truth")
    called, positive, known = _binary(stated, truth, names, uncertain, blank)
    hits, calls, true = called & positive & known, called & known, positive & known
    counts = np.concatenate([table.astype(np.float64) for table in (hits, calls, true)], axis=1)
    found: dict[str, Estimate] = {}
    for number, metric in enumerate(METRICS):
        averages = {
            "macro": partial(_macro, counts, len(names), number),
            "micro": partial(_micro, counts, len(names), number),
            "example": partial(_example, *_by_report(counts, len(names), number, empty)),
        }
        singles = {
            name: partial(_micro, counts[:, column :: len(names)], 1, number)
            for column, name in enumerate(names)
        }
        for name, statistic in (averages | singles).items():
            estimate = bootstrap.estimate(statistic)
            if not np.isnan(estimate.value):
                found[f"{metric}/{name}"] = estimate
    return found


def no_finding(table: LabelTable, other_than: Sequence[str]) -> Floats:
    """[N] 1 where a report states no finding and none is uncertain, else 0 (CheXpert).

    `other_than` are the columns that do not count: "No Finding" itself, and devices, which are no findings.
    """
    names = [name for name in table.names if plain(name) not in {plain(other) for other in other_than}]
    values = table.columns(names)
    return np.where(((values == 1) | (values == -1)).any(axis=1), 0.0, 1.0)


def _binary(
    stated: LabelTable, truth: LabelTable, names: Sequence[str], uncertain: Uncertain, blank: Blank
) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]:
    """[N, C] whether a finding is stated, whether it is true, and whether it counts."""
    said, real = stated.columns(names), truth.columns(names)
    side = uncertain == "positive"
    called = (said == 1) | ((said == -1) & side)
    positive = (real == 1) | ((real == -1) & side)
    known = np.ones(real.shape, dtype=bool)
    if uncertain == "exclude":
        known &= real != -1
    if blank == "exclude":
        known &= ~np.isnan(real)
    return called, positive, known


def _ratio(hits: Floats, calls: Floats, true: Floats, metric: int) -> Floats:
    """Precision, recall or F1; NaN where nothing is called and nothing true, 0 where only one of them is."""
    top, bottom = ((hits, calls), (hits, true), (2 * hits, calls + true))[metric]
    ratio = np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 0)
    return np.where(calls + true > 0, ratio, np.nan)


def _sums(counts: Floats, findings: int, weights: Floats) -> tuple[Floats, Floats, Floats]:
    """[R, findings] hits, calls and true ones in each resample."""
    hits, calls, true = np.split(weights @ counts, [findings, 2 * findings], axis=1)
    return hits, calls, true


def _macro(counts: Floats, findings: int, metric: int, weights: Floats) -> Floats:
    return _mean(_ratio(*_sums(counts, findings, weights), metric))


def _micro(counts: Floats, findings: int, metric: int, weights: Floats) -> Floats:
    hits, calls, true = (table.sum(axis=1) for table in _sums(counts, findings, weights))
    return _ratio(hits, calls, true, metric)


def _by_report(counts: Floats, findings: int, metric: int, empty: Empty) -> tuple[Floats, Floats]:
    """[N] the measure of each report (0 where it has none), and whether it has one."""
    hits, calls, true = (table.sum(axis=1) for table in np.split(counts, [findings, 2 * findings], axis=1))
    values = _ratio(hits, calls, true, metric)
    if empty == "one":
        values = np.where(np.isnan(values), 1.0, values)
    return np.nan_to_num(values), (~np.isnan(values)).astype(np.float64)


def _example(values: Floats, counted: Floats, weights: Floats) -> Floats:
    total = weights @ counted
    mean: Floats = np.divide(
        weights @ (values * counted), total, out=np.full(len(total), np.nan), where=total > 0
    )
    return mean


def _mean(values: Floats) -> Floats:
    """[R] means over the columns of [R, C] that are not NaN; NaN without one."""
    defined = ~np.isnan(values)
    count = defined.sum(axis=1)
    total = np.where(defined, values, 0.0).sum(axis=1)
    mean: Floats = np.divide(total, count, out=np.full(len(total), np.nan), where=count > 0)
    return mean
