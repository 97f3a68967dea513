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
    strict_accuracy: bool = False,
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
        strict_accuracy: for accuracy, a score at the threshold is no call (published MedKLIP and MeDSLIP).

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
                called, above = score >= called_from[name], score > called_from[name]
                statistics["f1"] = partial(f1, called, positive)
                statistics["accuracy"] = partial(accuracy, above if strict_accuracy else called, positive)
        for metric, statistic in statistics.items():
            value = float(statistic(np.ones((1, len(rows))))[0])
            draws = bootstrap.draws(statistic, rows)
            found[f"{metric}/{name}"] = estimate(value, draws)
            macros.setdefault(metric, Macro()).add(value, draws)
    return {f"{metric}/macro": macro.estimate() for metric, macro in macros.items()} | found


def score_classes(
    scores: Floats, truth: Floats, names: Sequence[str], bootstrap: PatientBootstrap
) -> dict[str, Estimate]:
    """Accuracy, balanced accuracy and macro F1 of samples that are each of one class.

    The class with the highest score is called, of equal ones the first. Samples with none or several classes
    do not count.

    Args:
        scores: [N, C]. truth: [N, C], 1 for the class. names: the C classes.
        bootstrap: resamples of the N samples' patients.

    Returns:
        `class_accuracy/macro` (over samples), `balanced_accuracy/macro` and `class_f1/macro` (means over the
        classes), and the recall and F1 of each class.
    """
    rows = np.flatnonzero((truth == 1).sum(axis=1) == 1)
    if not len(rows):
        return {}
    called, of = scores[rows].argmax(axis=1), (truth[rows] == 1).argmax(axis=1)
    right = bootstrap.estimate(partial(_share, called == of), rows)
    found, macros = {"class_accuracy/macro": right}, {"balanced_accuracy": Macro(), "class_f1": Macro()}
    for number, name in enumerate(names):
        own = rows[of == number]
        if not len(own):
            continue
        for metric, statistic, which in (
            ("balanced_accuracy", partial(_share, (called == number)[of == number]), own),
            ("class_f1", partial(f1, called == number, of == number), rows),
        ):
            value = float(statistic(np.ones((1, len(which))))[0])
            draws = bootstrap.draws(statistic, which)
            found[f"{metric}/{name}"] = estimate(value, draws)
            macros[metric].add(value, draws)
    return found | {f"{metric}/macro": macro.estimate() for metric, macro in macros.items()}


def _share(right: NDArray[np.bool_], weights: Floats) -> Floats:
    """[R] weighted share of what is right; NaN in resamples without a sample."""
    total = weights.sum(axis=1)
    undefined = np.full(len(total), np.nan)
    return np.asarray(np.divide(weights @ right.astype(float), total, out=undefined, where=total > 0))


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
