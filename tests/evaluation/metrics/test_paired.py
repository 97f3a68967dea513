"""Differences by patient and seed: as a loop over patients has them, and claimed as rarely as they say."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from medvlp.evaluation.metrics.binary import auroc
from medvlp.evaluation.metrics.bootstrap import PatientBootstrap, Resampled
from medvlp.evaluation.metrics.paired import Difference, paired_difference

SEEDS, RESAMPLES = 3, 60


def test_it_is_what_a_loop_over_patients_and_seeds_gives() -> None:
    """Both sides resampled together, patient by patient, the metric recomputed by scikit-learn each time."""
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(30), 2)
    truth = rng.random(60) < 0.4
    ours, theirs = (rng.normal(size=(SEEDS, 60)) + lift * truth for lift in (1.0, 0.4))
    bootstrap = PatientBootstrap(patients.astype(str), RESAMPLES, 7)
    found: list[Resampled] = []
    for scores in (*ours, *theirs):
        estimate = bootstrap.estimate(lambda weights, of=scores: auroc(of, truth, weights))
        assert isinstance(estimate, Resampled)
        found.append(estimate)
    values = np.array([item.value for item in found]).reshape(2, SEEDS)
    drawn = np.stack([item.draws for item in found]).reshape(2, SEEDS, RESAMPLES)
    difference = paired_difference(*values, *drawn)

    names = np.unique(patients.astype(str))
    loop = []
    for chosen in np.random.default_rng(7).integers(0, 30, (RESAMPLES, 30)):
        samples = np.concatenate([np.flatnonzero(patients.astype(str) == names[one]) for one in chosen])
        both = [
            np.mean([roc_auc_score(truth[samples], scores[samples]) for scores in side])
            for side in (ours, theirs)
        ]
        loop.append(both[0] - both[1])
    each = [
        roc_auc_score(truth, one) - roc_auc_score(truth, other)
        for one, other in zip(ours, theirs, strict=True)
    ]
    by_patient, by_seed = np.var(loop, ddof=1), np.var(each, ddof=1) / SEEDS
    freedom = (by_patient + by_seed) ** 2 / (by_seed**2 / (SEEDS - 1))
    half = stats.t.ppf(0.975, freedom) * np.sqrt(by_patient + by_seed)
    expected = (np.mean(each), np.mean(each) - half, np.mean(each) + half)
    assert (difference.value, difference.low, difference.high) == pytest.approx(expected, abs=1e-9)


def study(rng: np.random.Generator, by_patient: float, by_seed: float, effect: float = 0.0):
    """A metric that is a mean over 40 patients, of two ways of training with three seeds each."""
    hard = rng.normal(size=40)
    noise = by_patient * rng.normal(size=(2, SEEDS, 40)) + by_seed * rng.normal(size=(2, SEEDS, 1))
    values = hard + noise
    values[0] += effect
    weights = rng.multinomial(40, np.full(40, 1 / 40), size=100) / 40
    return values.mean(-1), values @ weights.T


@pytest.mark.parametrize(("by_patient", "by_seed"), [(1.0, 0.0), (0.3, 0.3), (0.01, 0.3)])
def test_equal_ways_are_told_apart_once_in_twenty_times(by_patient: float, by_seed: float) -> None:
    rng, claimed = np.random.default_rng(1), 0
    for _ in range(400):
        values, drawn = study(rng, by_patient, by_seed)
        claimed += paired_difference(*values, *drawn).claimed
    assert claimed <= 32, "5 % of 400 and two and a half of its standard deviations"


def test_what_percentiles_over_seeds_would_claim() -> None:
    """The reason why seeds are not resampled: three of one sign are a claim, and a quarter is by chance."""
    rng, claimed = np.random.default_rng(1), 0
    for _ in range(200):
        _, drawn = study(rng, 0.01, 0.3)
        seeds = rng.integers(0, SEEDS, (100, SEEDS))
        both = np.stack([(drawn[0] - drawn[1])[chosen, r].mean() for r, chosen in enumerate(seeds)])
        low, high = np.percentile(both, [2.5, 97.5])
        claimed += low > 0 or high < 0
    assert claimed > 30


def test_a_difference_larger_than_both_spreads_is_claimed_with_its_sign() -> None:
    rng = np.random.default_rng(2)
    for effect in (1.0, -1.0):
        values, drawn = study(rng, 0.3, 0.05, effect)
        difference = paired_difference(*values, *drawn)
        assert difference.claimed
        assert difference.low is not None
        assert difference.low < difference.value < difference.high
        assert np.sign(difference.value) == effect


def test_one_seed_claims_nothing() -> None:
    values, drawn = study(np.random.default_rng(3), 0.3, 0.0, 5.0)
    difference = paired_difference(values[0, :1], values[1, :1], drawn[0, :1], drawn[1, :1])
    assert difference.low is not None
    assert difference.low > 0
    assert not difference.claimed


def test_undefined_resamples_do_not_count() -> None:
    values, drawn = study(np.random.default_rng(4), 0.3, 0.1)
    some = drawn.copy()
    some[0, 1, :50] = np.nan
    assert paired_difference(*values, *some) == paired_difference(*values, *drawn[..., 50:])
    some[:] = np.nan
    nothing = paired_difference(*values, *some)
    assert (nothing.low, nothing.high, nothing.claimed) == (None, None, False)
    assert Difference(0.1, 0.05, 0.2, 2).claimed
