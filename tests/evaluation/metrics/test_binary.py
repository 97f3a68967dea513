"""Each metric equals scikit-learn's, for every row of weights and with ties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference

from medvlp.evaluation.metrics.binary import accuracy, auroc, average_precision, best_f1_threshold, f1

FEW = settings(max_examples=50)


@st.composite
def scored(draw, resamples: int = 3):
    """Scores on a coarse grid (many ties), truth with both classes, integer weights that keep both."""
    samples = draw(st.integers(2, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scores = rng.integers(0, draw(st.integers(1, 20)), samples) / 7.0
    truth = rng.random(samples) < 0.5
    truth[:2] = [True, False]
    weights = rng.integers(0, 4, (resamples, samples)).astype(float)
    weights[:, :2] += 1
    return scores, truth, weights


@FEW
@given(scored())
def test_auroc_is_scikit_learns(case) -> None:
    scores, truth, weights = case
    expected = [reference.roc_auc_score(truth, scores, sample_weight=row) for row in weights]
    np.testing.assert_allclose(auroc(scores, truth, weights), expected, atol=1e-12)
    np.testing.assert_allclose(auroc(scores, truth), [reference.roc_auc_score(truth, scores)], atol=1e-12)


@FEW
@given(scored())
def test_average_precision_is_scikit_learns(case) -> None:
    scores, truth, weights = case
    expected = [reference.average_precision_score(truth, scores, sample_weight=row) for row in weights]
    np.testing.assert_allclose(average_precision(scores, truth, weights), expected, atol=1e-12)


@FEW
@given(scored(), st.floats(0, 3))
def test_f1_and_accuracy_are_scikit_learns(case, threshold: float) -> None:
    scores, truth, weights = case
    called = scores >= threshold
    expected_f1 = [reference.f1_score(truth, called, sample_weight=row) for row in weights]
    expected_accuracy = [reference.accuracy_score(truth, called, sample_weight=row) for row in weights]
    np.testing.assert_allclose(f1(called, truth, weights), expected_f1, atol=1e-12)
    np.testing.assert_allclose(accuracy(called, truth, weights), expected_accuracy, atol=1e-12)


@FEW
@given(scored())
def test_no_threshold_has_a_better_f1(case) -> None:
    scores, truth, _ = case
    best = f1(scores >= best_f1_threshold(scores, truth), truth)[0]
    assert best == max(f1(scores >= threshold, truth)[0] for threshold in scores)


def test_a_resample_without_one_class_is_undefined() -> None:
    scores, truth = np.array([0.1, 0.9]), np.array([False, True])
    weights = np.array([[2.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    np.testing.assert_array_equal(auroc(scores, truth, weights), [np.nan, np.nan, 1.0])
    np.testing.assert_array_equal(average_precision(scores, truth, weights), [np.nan, 1.0, 1.0])


def test_scores_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        auroc(np.array([0.0, np.nan]), np.array([True, False]))
    with pytest.raises(ValueError, match="one length"):
        auroc(np.zeros(3), np.array([True, False]))


def test_a_threshold_needs_a_positive() -> None:
    with pytest.raises(ValueError, match="positive"):
        best_f1_threshold(np.array([0.0, 1.0]), np.array([False, False]))
