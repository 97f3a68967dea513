"""Intervals resample patients, cover the truth as often as they say, and are quick."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medvlp.evaluation.metrics.binary import auroc
from medvlp.evaluation.metrics.bootstrap import Estimate, Macro, PatientBootstrap, estimate


def mean_of(values: np.ndarray):
    return lambda weights: weights @ values / weights.sum(axis=1)


@settings(max_examples=30)
@given(st.lists(st.integers(0, 8), min_size=1, max_size=40), st.integers(1, 20), st.integers(0, 1000))
def test_patients_are_drawn_whole(patients: list[int], resamples: int, seed: int) -> None:
    names = np.array([f"p{number}" for number in patients])
    bootstrap = PatientBootstrap(names, resamples, seed)
    seen: list[np.ndarray] = []
    bootstrap.draws(lambda weights: seen.append(weights) or np.zeros(len(weights)))
    weights = np.concatenate(seen)
    assert weights.shape == (resamples, len(names))
    _, first = np.unique(names, return_index=True)
    assert (weights[:, first].sum(axis=1) == len(first)).all(), (
        "as many patients as there are, with replacement"
    )
    for name in set(names):
        own = weights[:, names == name]
        assert (own == own[:, :1]).all(), "all images of a patient come together"


def test_rows_choose_the_same_patients_for_a_subset() -> None:
    patients = np.array(["a", "b", "b", "c", "d"])
    bootstrap, rows = PatientBootstrap(patients, 50, 1), np.array([0, 2, 4])
    all_of, some_of = [], []
    bootstrap.draws(lambda weights: all_of.append(weights) or np.zeros(len(weights)))
    bootstrap.draws(lambda weights: some_of.append(weights) or np.zeros(len(weights)), rows)
    np.testing.assert_array_equal(np.concatenate(all_of)[:, rows], np.concatenate(some_of))


def test_more_images_of_the_same_patients_do_not_narrow_the_interval() -> None:
    rng = np.random.default_rng(0)
    values, patients = rng.normal(size=60), np.arange(60)
    once = PatientBootstrap(patients, 2000, 0).estimate(mean_of(values))
    copied = PatientBootstrap(np.repeat(patients, 9), 2000, 0).estimate(mean_of(np.repeat(values, 9)))
    assert copied.high - copied.low == pytest.approx(once.high - once.low, rel=1e-9)
    pretending = PatientBootstrap(np.arange(540), 2000, 0).estimate(mean_of(np.repeat(values, 9)))
    assert pretending.high - pretending.low < 0.5 * (once.high - once.low)


def test_intervals_cover_the_true_value_about_95_times_in_100() -> None:
    # Two normal populations one deviation apart have AUROC Phi(1 / sqrt(2)) = 0.760.
    rng, covered = np.random.default_rng(1), 0
    truth = np.arange(120) % 2 == 1
    for trial in range(200):
        scores = rng.normal(size=120) + truth
        found = PatientBootstrap(np.arange(120), 300, trial).estimate(lambda w, s=scores: auroc(s, truth, w))
        covered += found.low <= 0.7602 <= found.high
    assert 180 <= covered <= 199


def test_the_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    values, patients = np.random.default_rng(0).normal(size=30), np.arange(30)
    draws = [PatientBootstrap(patients, 100, seed).draws(mean_of(values)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert not np.array_equal(draws[0], draws[2])


def test_undefined_draws_do_not_count_and_no_draws_give_no_interval() -> None:
    found = estimate(0.5, np.array([np.nan, 0.2, 0.4]))
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.205, 0.395))
    assert estimate(0.5, np.full(3, np.nan)) == Estimate(0.5)
    assert PatientBootstrap(["a", "b"], 0, 0).estimate(mean_of(np.array([1.0, 3.0]))) == Estimate(2.0)


def test_a_macro_draw_is_the_mean_of_the_findings_defined_in_it() -> None:
    macro = Macro()
    macro.add(0.6, np.array([0.5, np.nan, np.nan]))
    macro.add(0.8, np.array([0.7, 0.9, np.nan]))
    expected = estimate(0.7, np.array([0.6, 0.9]))
    found = macro.estimate()
    assert (found.value, found.low, found.high) == pytest.approx((0.7, expected.low, expected.high))


def test_a_thousand_resamples_of_twelve_findings_take_seconds_at_most() -> None:
    rng = np.random.default_rng(0)
    truth, scores = rng.random((12, 500)) < 0.2, rng.normal(size=(12, 500))
    bootstrap = PatientBootstrap(np.arange(500) // 2, 1000, 0)
    start = time.perf_counter()
    for finding in range(12):
        bootstrap.estimate(lambda w, f=finding: auroc(scores[f], truth[f], w))
    assert time.perf_counter() - start < 3.0
