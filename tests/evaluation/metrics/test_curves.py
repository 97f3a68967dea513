"""Curves of scores: the areas under them are the numbers of the tables, and counts are counts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from medvlp.evaluation.metrics import curves

RNG = np.random.default_rng(0)
TRUTH = (RNG.random((600, 3)) < [0.5, 0.2, 0.05]).astype(float)
SCORES = np.round(TRUTH + RNG.normal(size=TRUTH.shape), 1)  # with ties


def test_the_areas_are_those_of_the_tables() -> None:
    rocs, recalls = curves.roc(SCORES, TRUTH), curves.precision_recall(SCORES, TRUTH)
    areas = [roc_auc_score(TRUTH[:, column], SCORES[:, column]) for column in range(3)]
    precisions = [average_precision_score(TRUTH[:, column], SCORES[:, column]) for column in range(3)]
    for column in range(3):
        assert np.trapezoid(rocs[column].y, rocs[column].x) == pytest.approx(areas[column], abs=1e-3)
        assert recalls[column].y[1:].mean() == pytest.approx(precisions[column], abs=2e-2)
    mean = curves.mean_roc(rocs)
    assert (mean.x[0], mean.y[0], mean.x[-1], mean.y[-1]) == (0, 0, 1, 1)
    assert np.trapezoid(mean.y, mean.x) == pytest.approx(np.mean(areas), abs=3e-3)
    assert curves.mean_precision(recalls).y[1:].mean() == pytest.approx(np.mean(precisions), abs=2e-2)


def test_a_finding_of_one_class_and_unknown_labels_have_no_curve() -> None:
    truth = np.column_stack([TRUTH[:, 0], np.zeros(600), np.full(600, np.nan)])
    assert list(curves.roc(SCORES, truth)) == list(curves.precision_recall(SCORES, truth)) == [0]
    half = np.where(np.arange(600) < 300, TRUTH[:, 0], np.nan)[:, None]
    known = curves.roc(SCORES[:300, :1], TRUTH[:300, :1])[0]
    np.testing.assert_array_equal(curves.roc(SCORES[:, :1], half)[0].y, known.y)


def test_what_is_said_truly_lies_on_the_diagonal() -> None:
    said = RNG.random((20000, 2))
    truth = (RNG.random(said.shape) < said).astype(float)
    truth[:500] = np.nan
    points, error = curves.calibration(said, truth)
    assert len(points.x) == 10
    np.testing.assert_allclose(points.x, points.y, atol=0.05)
    assert error < 0.02
    _, far = curves.calibration(np.full((100, 1), 0.9), np.zeros((100, 1)))
    assert far == pytest.approx(0.9)
    exclusive = curves.probabilities(np.array([[1000.0, 0.0], [0.0, 0.0]]), exclusive=True)
    np.testing.assert_allclose(exclusive, [[1, 0], [0.5, 0.5]])
    assert curves.probabilities(np.array([[0.0, -2000.0]]), exclusive=False).tolist() == [[0.5, 0.0]]


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.floats(-2, 2))
def test_every_known_sample_is_counted_once(seed: int, threshold: float) -> None:
    rng = np.random.default_rng(seed)
    truth = rng.choice([0.0, 1.0, np.nan], 50)
    scores = rng.normal(size=50)
    found = curves.confusion(scores, truth, threshold)
    assert sum(found) == (~np.isnan(truth)).sum()
    assert found.present_called + found.absent_called == ((scores >= threshold) & ~np.isnan(truth)).sum()
    assert found.present_called + found.present_not_called == np.nansum(truth)


def test_classes_are_counted_by_row_of_the_truth() -> None:
    truth = np.eye(3)[[0, 0, 1, 2]]
    truth = np.vstack([truth, np.zeros(3)])  # of no class
    scores = np.eye(3)[[0, 1, 1, 0, 0]]
    assert curves.class_confusion(scores, truth).tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]
