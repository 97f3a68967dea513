"""Metrics of per-finding scores with intervals: what zero-shot classification and linear probes share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from medvlp.evaluation.metrics.binary import accuracy, auroc, average_precision, best_f1_threshold, f1
from medvlp.evaluation.metrics.bootstrap import Estimate, Macro, PatientBootstrap, Statistic, estimate

Floats = NDArray[np.float64]


@dataclass
class Selection:
    """Scores and labels of the split on which thresholds are chosen (never the one evaluated)."""

    split: str
    scores: Floats
    truth: Floats


@dataclass
class Scored:
    """Metrics of one model: `auroc/<finding>`, `auroc/macro`, ...; and the thresholds of F1 and accuracy."""

    metrics: dict[str, Estimate] = field(default_factory=dict)
    thresholds: dict[str, float] = field(default_factory=dict)


def score_findings(
    scores: Floats,
    truth: Floats,
    names: Sequence[str],
    bootstrap: PatientBootstrap,
    selection: Selection | None = None,
    only_auroc: bool = False,
) -> Scored:
    """AUROC, average precision, and F1 and accuracy at the threshold with the best F1 on the selection split.

    Args:
        scores: [N, C], higher for positives.
        truth: [N, C] labels 1, 0 or NaN (not counted); every finding has both classes
            (`labels.not_evaluable` has taken the others out).
        names: the C findings.
        bootstrap: resamples of the N samples' patients.
        selection: another split's scores for the thresholds; without it, or for a finding without positives
            there, F1 and accuracy are left out.
        only_auroc: leave the other metrics out.

    Returns:
        Estimates by `<metric>/<finding>` and `<metric>/macro`, the mean over findings.
    """
    result = Scored()
    macros: dict[str, Macro] = {}
    for column, name in enumerate(names):
        rows = np.flatnonzero(~np.isnan(truth[:, column]))
        score, positive = scores[rows, column], truth[rows, column] == 1
        statistics: dict[str, Statistic] = {"auroc": partial(auroc, score, positive)}
        if not only_auroc:
            statistics["pr_auc"] = partial(average_precision, score, positive)
            threshold = _threshold(selection, column)
            if threshold is not None:
                result.thresholds[name] = threshold
                called = score >= threshold
                statistics["f1"] = partial(f1, called, positive)
                statistics["accuracy"] = partial(accuracy, called, positive)
        for metric, statistic in statistics.items():
            value = float(statistic(np.ones((1, len(rows))))[0])
            draws = bootstrap.draws(statistic, rows)
            result.metrics[f"{metric}/{name}"] = estimate(value, draws)
            macros.setdefault(metric, Macro()).add(value, draws)
    result.metrics = {
        f"{metric}/macro": macro.estimate() for metric, macro in macros.items()
    } | result.metrics
    return result


def chance(truth: Floats, names: Sequence[str], only_auroc: bool = False) -> dict[str, Estimate]:
    """What scores without any information give: AUROC 0.5 and an average precision of the prevalence."""
    found: dict[str, Estimate] = {"auroc/macro": Estimate(0.5)}
    if not only_auroc:
        prevalence = np.nanmean(truth, axis=0)
        found["pr_auc/macro"] = Estimate(float(prevalence.mean()))
        found |= {
            f"pr_auc/{name}": Estimate(float(share)) for name, share in zip(names, prevalence, strict=True)
        }
    return found | {f"auroc/{name}": Estimate(0.5) for name in names}


def _threshold(selection: Selection | None, column: int) -> float | None:
    if selection is None:
        return None
    truth = selection.truth[:, column]
    known = ~np.isnan(truth)
    if not (truth == 1).any():
        return None
    return best_f1_threshold(selection.scores[known, column], truth[known] == 1)
