"""Measures of maps against scikit-learn and loops over pixels, on random and on edge inputs."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, f1_score, jaccard_score, precision_score, recall_score

from medvlp.evaluation.metrics import localisation as measures
from medvlp.evaluation.metrics.localisation import (
    ThresholdCurve,
    contrast,
    localisation,
    min_max,
    overlap,
    pointing,
    uniform,
)
from medvlp.evaluation.metrics.pairs import weighted_mean
from medvlp.evaluation.places import paint

SIDE = 6
FEW = settings(max_examples=25)


@st.composite
def maps(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """A map with ties (eighths) and at least one true pixel."""
    cells = st.lists(st.integers(0, 8), min_size=SIDE * SIDE, max_size=SIDE * SIDE)
    true = draw(st.sets(st.integers(0, SIDE * SIDE - 1), min_size=1))
    truth = np.zeros(SIDE * SIDE, dtype=bool)
    truth[list(true)] = True
    return np.array(draw(cells)).reshape(SIDE, SIDE) / 8, truth.reshape(SIDE, SIDE)


@FEW
@given(maps(), st.sampled_from([0.0, 0.125, 0.3, 0.5, 1.0]))
def test_overlap_is_that_of_scikit_learn(given: tuple[np.ndarray, np.ndarray], threshold: float) -> None:
    heat, truth = given
    called, true = (heat > threshold).ravel(), truth.ravel()
    found = overlap(heat, truth, threshold)
    assert found["iou"] == pytest.approx(jaccard_score(true, called, zero_division=0))
    assert found["dice"] == pytest.approx(f1_score(true, called, zero_division=0))
    assert found["recall"] == pytest.approx(recall_score(true, called, zero_division=0))
    assert found["precision"] == pytest.approx(precision_score(true, called, zero_division=0))
    assert found["empty"] == (not called.any())


@FEW
@given(maps())
def test_the_others_are_those_of_loops(given: tuple[np.ndarray, np.ndarray]) -> None:
    heat, truth = given
    found = localisation(heat, truth, threshold=0.25)
    assert found["auprc"] == pytest.approx(average_precision_score(truth.ravel(), heat.ravel()))
    inside = [heat[i, j] for i in range(SIDE) for j in range(SIDE) if truth[i, j]]
    outside = [heat[i, j] for i in range(SIDE) for j in range(SIDE) if not truth[i, j]]
    means = [sum(values) / len(values) if values else 0.0 for values in (inside, outside)]
    squares = [
        sum((v - mean) ** 2 for v in values) / max(len(values), 1)
        for values, mean in zip((inside, outside), means, strict=True)
    ]
    noise = math.sqrt(sum(squares))
    signed = (means[0] - means[1]) / noise if noise > 0 and outside else 0.0
    assert found["cnr_signed"] == pytest.approx(signed, abs=1e-9)
    assert found["cnr"] == pytest.approx(abs(signed), abs=1e-9)
    best = max(inside + outside)
    hits = sum(value == best for value in inside) / sum(value == best for value in inside + outside)
    assert found["point"] == pytest.approx(0 if min(inside + outside) == best else hits)
    assert pointing(heat, truth, "any") == (best in inside)
    ious = [overlap(heat, truth, threshold)["iou"] for threshold in (0.1, 0.2, 0.3, 0.4, 0.5)]
    assert found["miou"] == pytest.approx(sum(ious) / 5)


def test_a_constant_map_points_at_nothing_and_calls_nothing() -> None:
    truth = np.eye(SIDE, dtype=bool)
    heat = min_max(np.full((SIDE, SIDE), 0.7))
    assert (heat == 0).all()
    found = localisation(heat, truth, threshold=0.0)
    assert (found["point"], found["iou"], found["dice"], found["empty"]) == (0, 0, 0, 1)
    assert found["auprc"] == pytest.approx(truth.mean())
    assert pointing(heat, truth, "any") == 1, "the published rule: one of the tied maxima is enough"


def test_a_finding_that_fills_the_image_has_no_outside() -> None:
    heat = np.random.default_rng(0).random((SIDE, SIDE))
    found = localisation(heat, np.ones((SIDE, SIDE), dtype=bool), threshold=0.5)
    assert (found["cnr"], found["point"], found["auprc"]) == (0, 1, 1)


def test_where_nothing_is_there_is_no_number() -> None:
    nothing = np.zeros((SIDE, SIDE), dtype=bool)
    for measure in (localisation, ThresholdCurve().add):
        with pytest.raises(ValueError, match="nothing is there"):
            measure(np.zeros((SIDE, SIDE)), nothing)


def test_an_inverted_map_scores_below_zero_unless_the_sign_is_dropped() -> None:
    truth = np.zeros((SIDE, SIDE), dtype=bool)
    truth[:2] = True
    heat = 1 - truth + 0.1 * np.random.default_rng(0).random((SIDE, SIDE))
    found = localisation(heat, truth)
    assert found["cnr_signed"] < -5
    assert found["cnr"] == -found["cnr_signed"]
    assert "iou" not in found


def test_boxes_by_themselves_have_each_other_outside() -> None:
    one, two = np.zeros((2, SIDE, SIDE), dtype=bool)
    one[:2], two[4:] = True, True
    heat = np.random.default_rng(1).random((SIDE, SIDE)) + (one | two)
    whole, each = localisation(heat, one | two), localisation(heat, one | two, [one, two])
    expected = (contrast(heat, one, ~one) + contrast(heat, two, ~two)) / 2
    assert each["cnr_signed"] == pytest.approx(expected)
    assert each["cnr_signed"] < whole["cnr_signed"]


@FEW
@given(maps())
def test_uniform_is_the_expected_random_map(given: tuple[np.ndarray, np.ndarray]) -> None:
    _, truth = given
    called = overlap(np.ones((SIDE, SIDE)), truth, 0.5)
    chance = uniform(truth)
    assert {name: chance[name] for name in called} == pytest.approx(called)
    points = [pointing(np.eye(1, SIDE * SIDE, k).reshape(SIDE, SIDE), truth) for k in range(SIDE * SIDE)]
    assert chance["point"] == pytest.approx(np.mean(points))


@FEW
@given(st.lists(maps(), min_size=1, max_size=4), st.sampled_from([(0.0, 1.0), (-1.0, 1.0)]))
def test_the_threshold_is_the_best_of_all_quantiles(
    given: list[tuple[np.ndarray, np.ndarray]], span: tuple[float, float]
) -> None:
    curve = ThresholdCurve(*span)
    for heat, truth in given:
        curve.add(heat, truth)
    values = np.concatenate([heat.ravel() for heat, _ in given])
    # Below and at each value: between two values of the maps all thresholds call the same pixels.
    tried = {max(float(v) + shift, span[0]) for v in values for shift in (0, -(2.0**-11))}
    ious = {t: np.mean([overlap(heat, truth, t)["iou"] for heat, truth in given]) for t in tried}
    chosen = curve.best()
    assert np.mean([overlap(heat, truth, chosen)["iou"] for heat, truth in given]) == pytest.approx(
        max(iou for t, iou in ious.items() if t < values.max()) if values.max() > span[0] else ious[span[0]]
    )


def test_a_curve_refuses_values_outside_its_range() -> None:
    with pytest.raises(ValueError, match="a value outside"):
        ThresholdCurve().add(np.full((2, 2), -0.1), np.ones((2, 2), dtype=bool))
    with pytest.raises(ValueError, match="at least one map"):
        ThresholdCurve().best()


def test_a_curve_takes_no_more_memory_for_more_maps() -> None:
    curve, rng = ThresholdCurve(), np.random.default_rng(0)
    held = sum(value.nbytes for value in vars(curve).values() if isinstance(value, np.ndarray))
    for _ in range(20):
        curve.add(rng.random((16, 16)), rng.random((16, 16)) > 0.5)
    assert sum(value.nbytes for value in vars(curve).values() if isinstance(value, np.ndarray)) == held


@FEW
@given(
    st.lists(
        st.tuples(st.floats(0, SIDE), st.floats(0, SIDE), st.floats(0, SIDE), st.floats(0, SIDE)), max_size=3
    )
)
def test_paint_is_a_loop_over_pixels(corners: list[tuple[float, float, float, float]]) -> None:
    boxes = np.array([[min(a, c), min(b, d), max(a, c), max(b, d)] for a, b, c, d in corners]).reshape(-1, 4)
    boxes = boxes[(boxes[:, 2] - boxes[:, 0] > 1) & (boxes[:, 3] - boxes[:, 1] > 1)]
    expected = [
        [any(x0 <= j + 0.5 < x1 and y0 <= i + 0.5 < y1 for x0, y0, x1, y1 in boxes) for j in range(SIDE)]
        for i in range(SIDE)
    ]
    np.testing.assert_array_equal(paint(boxes, SIDE), np.array(expected, dtype=bool))


@FEW
@given(st.floats(0, SIDE - 0.01), st.floats(1e-3, 0.4))
def test_a_box_never_vanishes(start: float, length: float) -> None:
    end = min(start + length, SIDE)
    painted = paint(np.array([[start, start, end, end]]), SIDE)
    assert painted.sum() == 1
    assert painted[int((start + end) / 2), int((start + end) / 2)] or painted[int(start), int(start)]


def test_a_weighted_mean_without_weight_is_no_number() -> None:
    found = weighted_mean(np.array([1.0, 3.0]), np.array([[1.0, 1.0], [0.0, 2.0], [0.0, 0.0]]))
    np.testing.assert_allclose(found, [2.0, 3.0, np.nan])


def test_min_max_keeps_the_order() -> None:
    heat = np.random.default_rng(0).normal(size=(SIDE, SIDE))
    scaled = min_max(heat)
    assert (scaled.min(), scaled.max()) == (0, 1)
    np.testing.assert_array_equal(np.argsort(scaled.ravel()), np.argsort(heat.ravel()))
    assert measures.QUANTILES == 101
