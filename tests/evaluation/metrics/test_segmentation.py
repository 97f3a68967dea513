"""Dice and IoU against published numbers, torchmetrics and loops; empty and unknown masks, thresholds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.segmentation import dice_score
from torchmetrics.functional.segmentation import mean_iou as their_iou

from medvlp.evaluation.metrics.bootstrap import PatientBootstrap
from medvlp.evaluation.metrics.segmentation import (
    MaskCounts,
    best_thresholds,
    dice,
    iou,
    pixel_counts,
)
from tests.golden_files import Golden, every

NAMES = ["mass", "edema", "none"]


def counted(called: np.ndarray, truth: np.ndarray, known: np.ndarray | None = None) -> MaskCounts:
    """Of [N, C, H, W] masks."""
    everywhere = np.ones(called.shape[:2], dtype=bool)
    names = NAMES[: called.shape[1]]
    return MaskCounts(names, pixel_counts(called, truth), everywhere if known is None else known)


def scored(
    called: np.ndarray, truth: np.ndarray, known: np.ndarray | None = None, **options
) -> dict[str, float]:
    found = counted(called, truth, known).metrics(PatientBootstrap(np.arange(len(called)), 0, 0), **options)
    return {name: estimate.value for name, estimate in found.items()}


@every("medslip_seg_*.npz")
def test_medslips_published_numbers(golden: Golden) -> None:
    called, truth = golden("logit").sigmoid().numpy() > 0.5, golden("target").numpy() > 0.5
    found = scored(called, truth)
    for measure in ("dice_all", "dice_pos", "dice_neg"):
        assert found[f"{measure}/mass"] == pytest.approx(golden(measure).item(), rel=1e-6)
    assert truth.any((1, 2, 3)).sum() == golden("num_pos").item()
    assert (~truth.any((1, 2, 3))).sum() == golden("num_neg").item()
    assert scored(called, truth, smooth=1.0)["iou_all/mass"] == pytest.approx(golden("miou").item(), rel=1e-6)


@every("mgca_seg_*.npz")
def test_mgcas_published_dice(golden: Golden) -> None:
    called, truth = golden("in_logits").sigmoid().numpy() > 0.5, golden("in_mask").numpy() > 0.5
    mean = dice(pixel_counts(called, truth)).mean()
    assert mean == pytest.approx(golden("out_dice_metric").item(), rel=1e-6)


def by_loop(called: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Dice and IoU of one image, pixel by pixel."""
    inside = [bool(c) and bool(t) for c, t in zip(called.ravel(), truth.ravel(), strict=True)]
    either = [bool(c) or bool(t) for c, t in zip(called.ravel(), truth.ravel(), strict=True)]
    if not any(either):
        return 1.0, 1.0
    return 2 * sum(inside) / (sum(inside) + sum(either)), sum(inside) / sum(either)


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.integers(1, 5), st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_numbers_of_an_image_equal_a_loop_and_torchmetrics(seed: int, side: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    called, truth = rng.random((2, side, side)) < share, rng.random((2, side, side)) < rng.random()
    counts = pixel_counts(called, truth)
    expected = np.array([by_loop(c, t) for c, t in zip(called, truth, strict=True)])
    np.testing.assert_allclose(np.stack([dice(counts), iou(counts)], 1), expected)
    if called.any((1, 2)).all() and truth.any((1, 2)).all():
        pair = torch.from_numpy(called[:, None]).int(), torch.from_numpy(truth[:, None]).int()
        theirs = dice_score(*pair, num_classes=1, include_background=True, average="macro")
        np.testing.assert_allclose(dice(counts), theirs.numpy().ravel(), rtol=1e-6)
        theirs = their_iou(*pair, num_classes=1, include_background=True, input_format="one-hot")
        np.testing.assert_allclose(iou(counts), theirs.numpy().ravel(), rtol=1e-6)


def test_calling_nothing_scores_the_share_of_images_without_the_finding() -> None:
    truth = np.zeros((100, 1, 4, 4), dtype=bool)
    truth[:22, 0, 1:3, 1:3] = True
    found = scored(np.zeros_like(truth), truth)
    values = {measure: found[f"{measure}/mass"] for measure in ("dice_all", "dice_pos", "dice_neg")}
    assert values == {"dice_all": 0.78, "dice_pos": 0.0, "dice_neg": 1.0}
    assert scored(np.ones_like(truth), truth)["dice_neg/mass"] == 0


def test_what_is_unknown_or_absent_gives_no_number() -> None:
    rng = np.random.default_rng(0)
    called, truth = rng.random((2, 6, 3, 4, 4)) < 0.5
    truth[:, 2] = False
    known = np.ones((6, 3), dtype=bool)
    known[::2, 0] = False
    found = scored(called, truth, known)
    assert not [metric for metric in found if metric.endswith("/none")]
    assert found["dice_all/mass"] == pytest.approx(dice(pixel_counts(called, truth))[1::2, 0].mean())
    assert found["dice_all/macro"] == pytest.approx((found["dice_all/mass"] + found["dice_all/edema"]) / 2)
    truth[0:5, 1] = False
    assert "dice_all/edema" not in scored(called, truth, known)
    truth[:, 0] = True
    assert "dice_neg/mass" not in scored(called, truth, known)


def test_published_reductions_weigh_and_drop_the_last_batch() -> None:
    truth = np.zeros((5, 1, 2, 2), dtype=bool)
    truth[:, 0, 0, 0] = True
    called = truth.copy()
    called[4] = ~truth[4]
    assert scored(called, truth)["dice_all/mass"] == pytest.approx(0.8)
    assert scored(called, truth, reduction="batch_mean", batch=4)["dice_all/mass"] == pytest.approx(0.5)
    assert scored(called, truth, batch=4, drop_last=True)["dice_all/mass"] == 1.0
    assert scored(called, truth, reduction="batch_mean", batch=5)["dice_all/mass"] == pytest.approx(0.8)


def test_intervals_are_by_patient() -> None:
    rng = np.random.default_rng(1)
    called, truth = rng.random((2, 20, 1, 4, 4)) < 0.4
    called[:10] = truth[:10]
    wide, narrow = (
        counted(called, truth).metrics(PatientBootstrap(of, 200, 0))["dice_all/mass"]
        for of in (np.arange(20) // 10, np.arange(20))
    )
    assert wide.value == narrow.value
    assert narrow.low < narrow.value < narrow.high
    assert wide.high - wide.low > narrow.high - narrow.low


@settings(max_examples=25)
@given(st.integers(0, 10_000))
def test_the_threshold_is_the_best_of_a_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = rng.random((6, 2, 4, 4)) < 0.3
    truth[:3], truth[3, :, 0, 0] = False, True
    known = np.ones((6, 2), dtype=bool)
    known[4, 0] = False
    probability = np.clip(truth * 0.3 + rng.random(truth.shape) * 0.6, 0, 1)
    called = probability[:, :, None] > np.arange(16)[:, None, None] / 16
    pixels = pixel_counts(called, np.broadcast_to(truth[:, :, None], called.shape))
    chosen = best_thresholds(NAMES[:2], pixels, known)

    def worth(column: int, threshold: int) -> float:
        rows = [i for i in range(6) if known[i, column]]
        of = [(float(dice(pixels[i, column, threshold])), bool(truth[i, column].any())) for i in rows]
        sides = [[value for value, shows in of if shows is side] for side in (True, False)]
        return (sum(sides[0]) / len(sides[0]) + sum(sides[1]) / len(sides[1])) / 2

    for column, name in enumerate(NAMES[:2]):
        best = max(worth(column, threshold) for threshold in range(16))
        assert worth(column, chosen[name]) == pytest.approx(best)


def test_no_threshold_of_a_finding_that_is_not_there() -> None:
    pixels = np.zeros((2, 2, 3, 3), dtype=np.int64)
    pixels[:, 0, :, 1] = 4
    assert best_thresholds(NAMES[:2], pixels, np.array([[True, True], [False, True]])) == {"mass": 1}
    assert best_thresholds(NAMES[:2], pixels, np.zeros((2, 2), dtype=bool)) == {}
