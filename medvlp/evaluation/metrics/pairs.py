"""Means over pairs of a sample and a finding, with intervals: of anything that is a number for each pair."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medvlp.evaluation.metrics.bootstrap import Estimate, Macro, PatientBootstrap, estimate

Floats = NDArray[np.float64]


class PairTable:
    """The numbers that models give to pairs of a sample and a finding."""

    #: Stands for a pair of no single finding, which is in no mean over findings.
    UNNAMED = "(no single finding)"

    def __init__(self) -> None:
        self._rows: list[int] = []
        self._findings: list[str] = []
        self._scores: dict[str, dict[str, list[float]]] = {}

    def add(self, row: int, finding: str, scores: Mapping[str, Mapping[str, float]]) -> None:
        """The measures of a pair by every model; all pairs have the same models and measures.

        `row` is the sample in the split; `scores` holds model -> measure -> value.
        """
        self._rows.append(row)
        self._findings.append(finding)
        for model, values in scores.items():
            of = self._scores.setdefault(model, {})
            for measure, value in values.items():
                of.setdefault(measure, []).append(value)

    @property
    def empty(self) -> bool:
        """Whether there is no pair."""
        return not self._rows

    def few(self) -> dict[str, int]:
        """Findings of fewer than two samples, with the number of these."""
        found: dict[str, set[int]] = {}
        for finding, row in zip(self._findings, self._rows, strict=True):
            found.setdefault(finding, set()).add(row)
        return {name: len(rows) for name, rows in sorted(found.items()) if len(rows) < 2}

    def counts(self, patients: NDArray[Any]) -> dict[str, int]:
        """Numbers of pairs, images and patients; `patients` [N] are those of the split's samples."""
        rows = np.unique(self._rows)
        return {
            "pairs": len(self._rows),
            "images": len(rows),
            "patients": len(np.unique(patients[rows])),
        }

    def metrics(self, group: str, bootstrap: PatientBootstrap) -> dict[str, dict[str, Estimate]]:
        """Estimates of every model, by `<measure>/<group>/` and then:

        a finding, the mean over its pairs, unless it has too few samples; "macro", the mean over these
        findings; "pairs", the mean over all pairs. `bootstrap` is of the samples of the split.
        """
        few = self.few()
        rows, findings = np.array(self._rows), np.array(self._findings)
        result: dict[str, dict[str, Estimate]] = {}
        for model, measures in self._scores.items():
            macros, single = {}, {}
            for measure, listed in measures.items():
                values = np.array(listed)
                every = bootstrap.estimate(partial(weighted_mean, values), rows)
                macros[f"{measure}/{group}/pairs"] = every
                macro, named = Macro(), [name for name in np.unique(findings) if name not in few]
                for name in named:
                    chosen = np.flatnonzero(findings == name)
                    draws = bootstrap.draws(partial(weighted_mean, values[chosen]), rows[chosen])
                    mean = float(values[chosen].mean())
                    single[f"{measure}/{group}/{name}"] = estimate(mean, draws)
                    if name != self.UNNAMED:
                        macro.add(mean, draws)
                if set(named) - {self.UNNAMED}:
                    macros[f"{measure}/{group}/macro"] = macro.estimate()
            result[model] = macros | single
        return result


def weighted_mean(values: Floats, weights: Floats) -> Floats:
    """[R] means of [n] values with [R, n] weights; NaN without weight."""
    total = weights.sum(axis=1)
    mean: Floats = np.divide(weights @ values, total, out=np.full(len(total), np.nan), where=total > 0)
    return mean
