"""Metrics of per-finding scores with intervals: of any classifier."""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from medvlp.evaluation.metrics.binary import accuracy, auroc, average_precision, best_f1_threshold, f1
from medvlp.evaluation.metrics.bootstrap import Estimate, Macro, PatientBootstrap, Statistic, estimate

Floats = NDArray[np.float64]


def thresholds(scores: Floats, truth: Floats, names: Sequence[str]) -> dict[str, float]:
    """The score from which on each finding is called positive: the one with the best F1.

    Args:
        scores: [N, C] of the split that chooses, never of the one evaluated.
        truth: [N, C] labels 1, 0 or NaN.
        names: the C findings; one without positives gets no threshold.
    """
    chosen = {}
    for column, name in enumerate(names):
        known = ~np.isnan(truth[:, column])
        if (truth[:, column] == 1).any():
            chosen[name] = best_f1_threshold(scores[known, column], truth[known, column] == 1)
    return chosen


def aurocs(scores: Floats, truth: Floats, names: Sequence[str], fewest: int) -> dict[str, float]:
    """`auroc/<finding>` of the findings with enough samples of both classes, and their mean `auroc/macro`.

    Args:
        scores: [N, C]. truth: [N, C] labels 1, 0 or NaN. names: the C findings.
        fewest: positives and negatives that a finding needs.
    """
    found = {}
    for column, name in enumerate(names):
        known = ~np.isnan(truth[:, column])
        positive = truth[known, column] == 1
        if min(positive.sum(), (~positive).sum()) >= fewest:
            found[f"auroc/{name}"] = float(auroc(scores[known, column], positive)[0])
    return found | ({"auroc/macro": float(np.mean(list(found.values())))} if found else {})


def score_findings(
    scores: Floats,
    truth: Floats,
    names: Sequence[str],
    bootstrap: PatientBootstrap,
    called_from: Mapping[str, float] | None = None,
    only_auroc: bool = False,
) -> dict[str, Estimate]:
    """AUROC, average precision, and F1 and accuracy at a threshold.

    Args:
        scores: [N, C], higher for positives.
        truth: [N, C] labels 1, 0 or NaN (not counted); every finding has both classes
            (`labels.not_evaluable` has taken the others out).
        names: the C findings.
        bootstrap: resamples of the N samples' patients.
        called_from: thresholds by finding; one without has no F1 and accuracy.
        only_auroc: leave the other metrics out.

    Returns:
        Estimates by `<metric>/<finding>` and `<metric>/macro`, the mean over findings.
    """
    found: dict[str, Estimate] = {}
    macros: dict[str, Macro] = {}
    for column, name in enumerate(names):
        rows = np.flatnonzero(~np.isnan(truth[:, column]))
        score, positive = scores[rows, column], truth[rows, column] == 1
        statistics: dict[str, Statistic] = {"auroc": partial(auroc, score, positive)}
        if not only_auroc:
            statistics["pr_auc"] = partial(average_precision, score, positive)
            if called_from is not None and name in called_from:
                called = score >= called_from[name]
                statistics["f1"] = partial(f1, called, positive)
                statistics["accuracy"] = partial(accuracy, called, positive)
        for metric, statistic in statistics.items():
            value = float(statistic(np.ones((1, len(rows))))[0])
            draws = bootstrap.draws(statistic, rows)
            found[f"{metric}/{name}"] = estimate(value, draws)
            macros.setdefault(metric, Macro()).add(value, draws)
    return {f"{metric}/macro": macro.estimate() for metric, macro in macros.items()} | found


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
