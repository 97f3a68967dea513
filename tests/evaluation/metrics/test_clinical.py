"""Clinical efficacy beside scikit-learn and loops; uncertain, blank and absent findings."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import precision_recall_fscore_support

from medvlp.evaluation.metrics.bootstrap import PatientBootstrap
from medvlp.evaluation.metrics.clinical import (
    METRICS,
    LabelTable,
    clinical_efficacy,
    no_finding,
)

NAMES = ["edema", "mass", "nodule", "fracture"]


def tables(seed: int, count: int, values: tuple[float, ...] = (0.0, 1.0)) -> tuple[LabelTable, LabelTable]:
    rng = np.random.default_rng(seed)
    return tuple(LabelTable(NAMES, rng.choice(values, (count, len(NAMES)))) for _ in range(2))  # type: ignore[return-value]


def no_resamples(count: int) -> PatientBootstrap:
    return PatientBootstrap(np.arange(count), 0, 0)


@pytest.mark.parametrize("seed", range(5))
def test_equals_scikit_learn(seed: int) -> None:
    stated, truth = tables(seed, 30)
    found = clinical_efficacy(stated, truth, NAMES, no_resamples(30))
    for average in ("macro", "micro"):
        theirs = precision_recall_fscore_support(
            truth.values, stated.values, average=average, zero_division=0
        )
        assert [found[f"{metric}/{average}"].value for metric in METRICS] == pytest.approx(theirs[:3])
    single = precision_recall_fscore_support(truth.values, stated.values, average=None, zero_division=0)
    for column, name in enumerate(NAMES):
        assert [found[f"{metric}/{name}"].value for metric in METRICS] == pytest.approx(
            [values[column] for values in single[:3]]
        )
    some = (truth.values + stated.values).any(axis=1)
    theirs = precision_recall_fscore_support(
        truth.values[some], stated.values[some], average="samples", zero_division=0
    )
    assert [found[f"{metric}/example"].value for metric in METRICS] == pytest.approx(theirs[:3])


def test_a_finding_nobody_states_is_not_in_the_macro_mean() -> None:
    """scikit-learn's default counts it as 0, which lowers the mean."""
    stated, truth = tables(0, 40)
    stated.values[:, 3] = truth.values[:, 3] = 0
    found = clinical_efficacy(stated, truth, NAMES, no_resamples(40))
    theirs = precision_recall_fscore_support(truth.values, stated.values, average="macro", zero_division=0)
    assert found["f1/macro"].value == pytest.approx(theirs[2] * 4 / 3)
    assert "f1/fracture" not in found


def test_a_true_finding_that_is_never_stated_counts_as_0() -> None:
    truth = LabelTable(["edema", "mass"], np.array([[1.0, 1.0], [0.0, 0.0]]))
    stated = LabelTable(["edema", "mass"], np.array([[1.0, 0.0], [0.0, 0.0]]))
    found = clinical_efficacy(stated, truth, ["edema", "mass"], no_resamples(2))
    assert [found[f"{metric}/mass"].value for metric in METRICS] == [0, 0, 0]
    assert found["f1/macro"].value == 0.5
    assert found["recall/micro"].value == 0.5


def test_columns_are_matched_by_name() -> None:
    stated, truth = tables(1, 50)
    order = [2, 0, 3, 1]
    renamed = {"edema": "Edema", "mass": "MASS", "nodule": "Nodule", "fracture": "Fracture"}
    moved = LabelTable([renamed[NAMES[i]] for i in order], truth.values[:, order])
    expected = clinical_efficacy(stated, truth, NAMES, no_resamples(50))
    assert clinical_efficacy(stated, moved, NAMES, no_resamples(50)) == expected
    by_place = LabelTable(NAMES, moved.values)
    assert clinical_efficacy(stated, by_place, NAMES, no_resamples(50)) != expected
    with pytest.raises(ValueError, match="no column is named 'pneumonia'"):
        clinical_efficacy(stated, truth, ["pneumonia"], no_resamples(50))
    with pytest.raises(ValueError, match="two columns are named 'mass'"):
        LabelTable(["mass", "Mass"], np.zeros((1, 2))).columns(["mass"])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("uncertain", ["exclude", "positive", "negative"])
@pytest.mark.parametrize("blank", ["exclude", "negative"])
def test_uncertain_and_blank_labels_by_a_loop(seed: int, uncertain: str, blank: str) -> None:
    stated, truth = tables(seed, 60, (0.0, 1.0, -1.0, np.nan))
    found = clinical_efficacy(stated, truth, NAMES, no_resamples(60), uncertain, blank)  # type: ignore[arg-type]
    hits = calls = true = 0
    for said, real in zip(stated.values.ravel(), truth.values.ravel(), strict=True):
        if (uncertain == "exclude" and real == -1) or (blank == "exclude" and np.isnan(real)):
            continue
        called = said == 1 or (said == -1 and uncertain == "positive")
        positive = real == 1 or (real == -1 and uncertain == "positive")
        hits, calls, true = hits + (called and positive), calls + called, true + positive
    assert found["precision/micro"].value == pytest.approx(hits / calls)
    assert found["recall/micro"].value == pytest.approx(hits / true)


def test_a_report_without_findings_is_left_out_of_the_mean_over_reports_or_right() -> None:
    truth = LabelTable(NAMES[:2], np.array([[1.0, 0.0], [0.0, 0.0]]))
    stated = LabelTable(NAMES[:2], np.array([[1.0, 1.0], [0.0, 0.0]]))
    boot = no_resamples(2)
    assert clinical_efficacy(stated, truth, NAMES[:2], boot)["precision/example"].value == 0.5
    assert clinical_efficacy(stated, truth, NAMES[:2], boot, empty="one")["precision/example"].value == 0.75


def test_nothing_stated_and_nothing_true_gives_no_number() -> None:
    nothing = LabelTable(NAMES, np.zeros((3, 4)))
    assert clinical_efficacy(nothing, nothing, NAMES, no_resamples(3)) == {}
    assert clinical_efficacy(nothing, nothing, NAMES, no_resamples(3), empty="one")["f1/example"].value == 1


def test_intervals_are_of_repeated_patients() -> None:
    stated, truth = tables(2, 20)
    boot = PatientBootstrap(np.arange(20) // 2, 200, 0)
    found = clinical_efficacy(stated, truth, NAMES, boot)
    draws = []
    for row in np.random.default_rng(0).integers(0, 10, (200, 10)):
        rows = [sample for patient in row for sample in (2 * patient, 2 * patient + 1)]
        theirs = precision_recall_fscore_support(
            truth.values[rows], stated.values[rows], average="micro", zero_division=0
        )
        draws.append(theirs[2])
    low, high = np.percentile(draws, [2.5, 97.5])
    assert (found["f1/micro"].low, found["f1/micro"].high) == pytest.approx((low, high))


def test_no_finding_is_nothing_stated_or_uncertain_but_devices() -> None:
    table = LabelTable(
        ["No Finding", "Edema", "Support Devices"],
        np.array([[np.nan, 0, 1], [np.nan, -1, 0], [np.nan, 1, 0], [1, np.nan, np.nan]]),
    )
    assert no_finding(table, ["No Finding", "Support Devices"]).tolist() == [1, 0, 0, 1]
