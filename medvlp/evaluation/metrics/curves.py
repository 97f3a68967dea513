"""Curves of scores of findings, for people to look at: ROC, precision and recall, calibration, confusion.

The points of a finding are scikit-learn's; the mean over findings is such that the area under it is the
macro value of the tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
#: Places at which means of curves are taken, and most points of a drawn one.
_GRID = np.linspace(0, 1, 201)


class Curve(NamedTuple):
    """Points [K] of a line."""

    x: Floats
    y: Floats


def roc(scores: Floats, truth: Floats) -> dict[int, Curve]:
    """Column -> its ROC curve: true-positive rate over false-positive rate.

    Args:
        scores: [N, C] higher for positives. truth: [N, C] labels 1, 0 or NaN (not counted); a column
            without both classes has no curve.
    """
    from sklearn.metrics import roc_curve

    return {column: _thinned(Curve(*roc_curve(positive, score)[:2]))
            for column, (score, positive) in _known(scores, truth).items()}  # fmt: skip


def precision_recall(scores: Floats, truth: Floats) -> dict[int, Curve]:
    """Column -> precision over recall, as `roc`; a step that holds up to each point, from recall 0."""
    from sklearn.metrics import precision_recall_curve

    found = {}
    for column, (score, positive) in _known(scores, truth).items():
        precision, recall, _ = precision_recall_curve(positive, score, drop_intermediate=True)
        found[column] = _stepped(Curve(recall[::-1], precision[::-1]))
    return found


def mean_roc(curves: Mapping[int, Curve]) -> Curve:
    """The mean true-positive rate at each false-positive rate; from (0, 0)."""
    mean = np.mean([np.interp(_GRID, of.x, of.y) for of in curves.values()], axis=0)
    return Curve(np.concatenate([[0.0], _GRID]), np.concatenate([[0.0], mean]))


def mean_precision(curves: Mapping[int, Curve]) -> Curve:
    """The mean precision at each recall."""
    return Curve(_GRID, np.mean([np.interp(_GRID, of.x, of.y) for of in curves.values()], axis=0))


def probabilities(scores: Floats, exclusive: bool) -> Floats:
    """[N, C] log-odds -> probabilities; of exclusive findings logits -> probabilities that sum to 1."""
    from scipy.special import expit, softmax

    found: Floats = softmax(scores, axis=1) if exclusive else expit(scores)
    return found


def calibration(probability: Floats, truth: Floats, bins: int = 10) -> tuple[Curve, float]:
    """How often what is said with a probability is so, over all findings together.

    Args:
        probability: [N, C]. truth: [N, C] labels 1, 0 or NaN (not counted).
        bins: of equal width; those without a score have no point.

    Returns:
        (mean probability, share of positives) of each bin; and the expected calibration error, the mean
        distance of the two weighted by the scores in the bin.
    """
    known = ~np.isnan(truth)
    said, true = probability[known], truth[known]
    which = np.minimum((said * bins).astype(int), bins - 1)
    count = np.bincount(which, minlength=bins)
    filled = np.flatnonzero(count)
    mean = np.bincount(which, said, bins)[filled] / count[filled]
    share = np.bincount(which, true, bins)[filled] / count[filled]
    return Curve(mean, share), float(np.abs(mean - share) @ count[filled] / count.sum())


class Called(NamedTuple):
    """What became of the samples of a finding at its threshold, counts."""

    present_called: int
    present_not_called: int
    absent_called: int
    absent_not_called: int


def confusion(scores: Floats, truth: Floats, threshold: float) -> Called:
    """Counts of one finding: scores [N], labels [N] 1, 0 or NaN (not counted)."""
    called, present, absent = scores >= threshold, truth == 1, truth == 0
    return Called(*(int(both.sum()) for both in (called & present, ~called & present,
                                                 called & absent, ~called & absent)))  # fmt: skip


def class_confusion(scores: Floats, truth: Floats) -> NDArray[np.int64]:
    """[C, C] counts, row the class, column the highest score; samples of not exactly one class left out."""
    from sklearn.metrics import confusion_matrix

    rows = (truth == 1).sum(axis=1) == 1
    found: NDArray[np.int64] = confusion_matrix(
        (truth[rows] == 1).argmax(axis=1), scores[rows].argmax(axis=1), labels=range(truth.shape[1])
    )
    return found


def _known(scores: Floats, truth: Floats) -> dict[int, tuple[Floats, NDArray[np.bool_]]]:
    """Column -> its known scores and labels; without those of one class."""
    found = {}
    for column in range(scores.shape[1]):
        known = ~np.isnan(truth[:, column])
        positive = truth[known, column] == 1
        if 0 < positive.sum() < len(positive):
            found[column] = scores[known, column], positive
    return found


def _thinned(curve: Curve) -> Curve:
    """At most as many points as the grid has, the ends among them."""
    if len(curve.x) <= len(_GRID):
        return curve
    kept = np.unique(np.linspace(0, len(curve.x) - 1, len(_GRID)).round().astype(int))
    return Curve(curve.x[kept], curve.y[kept])


def _stepped(curve: Curve) -> Curve:
    """Precision at each recall of the grid: that of the first point which reaches it."""
    return Curve(_GRID, curve.y[np.searchsorted(curve.x, _GRID - 1e-12)])
