"""Box metrics against pycocotools' own sums, torchmetrics and loops; ties, hedged boxes, missing images."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.detection import MeanAveragePrecision

from medvlp.evaluation.metrics.bootstrap import PatientBootstrap
from medvlp.evaluation.metrics.detection import (
    FALSE_POSITIVES,
    MEASURES,
    THRESHOLDS,
    BoxScores,
    Found,
    Held,
    Ranked,
    average_precision,
    coco_evaluation,
    froc_ranking,
)
from shards.errors import NotFiniteError

NAMES = ["mass", "nodule"]
Images = list[tuple[Found, Held]]


def found(boxes: list[list[float]], scores: list[float], classes: list[int] | None = None) -> Found:
    kinds = [0] * len(boxes) if classes is None else classes
    return Found(
        np.array(boxes, float).reshape(-1, 4), np.array(scores, float), np.array(kinds, dtype=np.int64)
    )


def held(
    boxes: list[list[float]], classes: list[int] | None = None, hedged: list[bool] | None = None
) -> Held:
    kinds = [0] * len(boxes) if classes is None else classes
    doubtful = [False] * len(boxes) if hedged is None else hedged
    return Held(
        np.array(boxes, float).reshape(-1, 4), np.array(kinds, dtype=np.int64), np.array(doubtful, dtype=bool)
    )


def table_of(images: Images, names: list[str] = NAMES) -> BoxScores:
    table = BoxScores(names)
    for row, (seen, there) in enumerate(images):
        table.add(row, seen, there)
    return table


def values(images: Images, resamples: int = 0, **options) -> dict[str, float]:
    bootstrap = PatientBootstrap(np.arange(len(images)), resamples, 0)
    return {name: of.value for name, of in table_of(images).metrics(bootstrap, **options).items()}


def random_images(seed: int, count: int, hedged: bool, ties: bool) -> Images:
    """Boxes, and detections near some of them; some images without either."""
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(count):
        number = int(rng.integers(0, 4))
        corner = rng.uniform(0, 50, (number, 2))
        boxes = np.concatenate([corner, corner + rng.uniform(5, 30, (number, 2))], axis=1)
        kinds = rng.integers(0, 2, number)
        doubtful = rng.random(number) < (0.3 if hedged else 0)
        seen = np.concatenate([boxes + rng.normal(0, 2, boxes.shape), rng.uniform(0, 40, (3, 4))])
        seen[:, 2:] = np.maximum(seen[:, 2:], seen[:, :2] + 1)
        seen = seen[rng.random(len(seen)) < 0.7]
        scores = rng.random(len(seen))
        scores = np.round(scores, 1) if ties else scores
        images.append((Found(seen, scores, rng.integers(0, 2, len(seen))), Held(boxes, kinds, doubtful)))
    return images


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 12), st.booleans(), st.booleans())
def test_precision_equals_pycocotools(seed: int, count: int, hedged: bool, ties: bool) -> None:
    images = random_images(seed, count, hedged, ties)
    ours = values(images)
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = coco_evaluation([a for a, _ in images], [b for _, b in images], 2)
        theirs.evaluate()
        theirs.accumulate()
    precision = theirs.eval["precision"][:, :, :, 0, 0]  # [thresholds, recalls, classes], -1 without a box
    for number, name in enumerate(NAMES):
        for measure, chosen in MEASURES.items():
            expected = precision[chosen, :, number].mean()
            if expected < 0:
                assert f"{measure}/{name}" not in ours
            else:
                assert ours[f"{measure}/{name}"] == pytest.approx(expected, abs=1e-9)


@settings(max_examples=15)
@given(st.integers(0, 10_000), st.booleans())
def test_precision_equals_torchmetrics(seed: int, hedged: bool) -> None:
    images = random_images(seed, 8, hedged, ties=False)
    chosen = [float(t) for t in THRESHOLDS if t <= 0.75]
    # Its own recalls are float32, so that a recall of 0.2 misses the point at 0.2.
    recalls = np.linspace(0, 1, 101).tolist()
    metric = MeanAveragePrecision(iou_thresholds=chosen, rec_thresholds=recalls)
    for seen, there in images:
        kinds, crowd = torch.tensor(there.classes), torch.tensor(there.hedged).int()
        called = {"boxes": seen.boxes, "scores": seen.scores, "labels": seen.classes}
        truth = {"boxes": torch.tensor(there.boxes), "labels": kinds, "iscrowd": crowd}
        metric.update([{name: torch.tensor(of) for name, of in called.items()}], [truth])
    expected, ours = metric.compute()["map"].item(), values(images).get("map_40_75/macro")
    assert (ours is None) == (expected < 0)
    assert ours is None or ours == pytest.approx(expected, abs=1e-6)


@settings(max_examples=15)
@given(st.integers(0, 10_000), st.booleans())
def test_a_weight_is_so_many_copies_of_the_image(seed: int, hedged: bool) -> None:
    images, rng = random_images(seed, 6, hedged, ties=False), np.random.default_rng(seed)
    copies = rng.integers(0, 3, len(images))
    chosen = [image for image, number in zip(images, copies, strict=True) for _ in range(number)]
    expected = values(chosen) if chosen else {}
    table = table_of(images)

    class Copies(PatientBootstrap):
        def draws(self, statistic, rows=None):
            return statistic(copies[None, rows].astype(float))

    found = table.metrics(Copies(np.arange(len(images)), 1, 0))
    for metric, of in found.items():
        if of.low is None:
            assert metric not in expected
        elif not metric.endswith("/macro"):
            assert of.low == pytest.approx(expected[metric], abs=1e-9)


BOX, OTHER = [10.0, 10.0, 30.0, 30.0], [40.0, 40.0, 60.0, 60.0]


def test_the_published_skip_of_images_hides_misses_and_false_detections() -> None:
    missed = [(found([BOX], [0.9]), held([BOX])), (found([], []), held([BOX]))]
    assert values(missed)["map_40_75/mass"] == pytest.approx(51 / 101)
    assert values(missed, skipped="no_prediction_or_no_box")["map_40_75/mass"] == 1.0
    false = [(found([BOX], [0.5]), held([BOX])), (found([OTHER], [0.9]), held([]))]
    assert values(false)["map_40_75/mass"] == pytest.approx(0.5)
    assert values(false, skipped="no_prediction_or_no_box")["map_40_75/mass"] == 1.0
    assert values([missed[1], false[1]], skipped="no_prediction_or_no_box") == {}


def test_a_least_confidence_cuts_the_curve() -> None:
    images = [(found([BOX], [0.9]), held([BOX])), (found([BOX], [0.3]), held([BOX]))]
    assert values(images, confidence=0.001)["ap50/mass"] == 1.0
    assert values(images, confidence=0.5)["ap50/mass"] == pytest.approx(51 / 101)


def test_hedged_boxes_are_neither_missed_nor_found_falsely() -> None:
    images = [
        (found([BOX, OTHER], [0.5, 0.9]), held([BOX, OTHER], hedged=[False, True])),
        (found([OTHER, OTHER], [0.8, 0.7]), held([OTHER], hedged=[True])),
    ]
    found_values = values(images)
    assert found_values["ap50/mass"] == found_values["froc/mass"] == 1.0
    sure = [(seen, held(there.boxes.tolist())) for seen, there in images]
    assert values(sure)["ap50/mass"] < 1


def test_without_boxes_no_number_and_without_detections_zero() -> None:
    assert values([(found([BOX], [0.9]), held([])), (found([], []), held([BOX], [0], [True]))]) == {}
    nothing = values([(found([], []), held([BOX])), (found([], []), held([]))])
    assert set(nothing.values()) == {0.0}
    assert table_of([(found([], []), held([BOX, BOX], hedged=[True, False]))]).boxes() == {
        "mass": 1,
        "nodule": 0,
    }


def test_equal_scores_stand_in_the_order_of_the_samples() -> None:
    right, wrong = (found([BOX], [0.5]), held([BOX])), (found([OTHER], [0.5]), held([]))
    assert values([right, wrong])["ap50/mass"] == 1.0
    assert values([wrong, right])["ap50/mass"] == pytest.approx(0.5)
    table = BoxScores(NAMES)
    for row in (1, 0):
        table.add(row, *(right, wrong)[row])
    assert table.metrics(PatientBootstrap(np.arange(2), 0, 0))["ap50/mass"].value == 1.0


def test_no_box_is_taken_for_unmatched_and_nan_is_refused() -> None:
    """The first box has a number in pycocotools that is not its "no match"."""
    assert values([(found([BOX], [0.5]), held([BOX]))])["map_50_95/mass"] == 1.0
    with pytest.raises(NotFiniteError, match="boxes or scores found in sample 0 are NaN or infinite"):
        table_of([(found([BOX], [float("nan")]), held([BOX]))])


def froc_by_loop(images: Images, kind: int) -> float:
    """Sensitivities read off a list of all detections, one by one."""
    listed = [
        (-score, row, i)
        for row, (seen, _) in enumerate(images)
        for i, score in enumerate(seen.scores)
        if seen.classes[i] == kind
    ]
    total = sum(int(((there.classes == kind) & ~there.hedged).sum()) for _, there in images)
    best, hit, false = dict.fromkeys(FALSE_POSITIVES, 0), set(), 0
    for _, row, i in sorted(listed):
        seen, there = images[row]
        x, y = (seen.boxes[i, :2] + seen.boxes[i, 2:]) / 2
        inside = [
            j
            for j, (left, top, right, bottom) in enumerate(there.boxes)
            if there.classes[j] == kind and left <= x <= right and top <= y <= bottom
        ]
        hit |= {(row, j) for j in inside if not there.hedged[j]}
        false += not inside
        for level in FALSE_POSITIVES:
            if false <= level * len(images):
                best[level] = len(hit)
    return float(np.mean([count / total for count in best.values()]))


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 9), st.booleans())
def test_froc_equals_a_loop(seed: int, count: int, hedged: bool) -> None:
    images = random_images(seed, count, hedged, ties=False)
    ours = values(images)
    for number, name in enumerate(NAMES):
        if f"froc/{name}" in ours:
            assert ours[f"froc/{name}"] == pytest.approx(froc_by_loop(images, number))


def test_froc_counts_an_object_once_and_no_extra_hits() -> None:
    images = [(found([BOX, BOX, OTHER], [0.9, 0.8, 0.7]), held([BOX])), (found([], []), held([OTHER]))]
    ranked = froc_ranking([a for a, _ in images], [b for _, b in images], 0)
    assert ranked.worth.tolist() == [1.0]
    assert not ranked.false_at.toarray()[:, 0].any()
    assert values(images)["froc/mass"] == pytest.approx(0.5)


def test_a_large_split_needs_memory_for_its_false_detections_alone() -> None:
    """20,000 images with a box each: a table of images and boxes would be 3 GB."""
    count = 20_000
    scores, image = np.linspace(1, 0, 2 * count), np.repeat(np.arange(count), 2)
    worth = np.tile([1.0, 0.0], count)
    ranked = Ranked.of(scores, image, worth, worth == 0, np.ones(count))
    assert ranked.false_at.data.nbytes + ranked.false_at.indices.nbytes < 1 << 20
    found, wrong, boxes = ranked.sums(np.ones((1, count)))
    np.testing.assert_array_equal(wrong[0], np.arange(count))
    assert (found[0, -1], boxes[0]) == (count, count)


def test_intervals_hold_the_value_and_precision_is_undefined_without_boxes() -> None:
    images = random_images(3, 30, hedged=True, ties=True)
    found_values = table_of(images).metrics(PatientBootstrap(np.arange(30) // 3, 200, 0))
    for of in found_values.values():
        assert of.low <= of.value + 0.05
        assert of.value - 0.05 <= of.high
    ranked = froc_ranking([images[0][0]], [images[0][1]], 0)
    assert np.isnan(average_precision(ranked, np.zeros((1, 1)))).all()
