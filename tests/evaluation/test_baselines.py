"""The pixel baseline: each target on its known rows, and reports in the space of their words."""

from __future__ import annotations

import numpy as np
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.preprocessing import StandardScaler

from medvlp.evaluation.baselines import ALPHAS, PixelRidge, ReportWords
from tests.evaluation.prepared import make_split


def test_pixel_ridge_fits_each_finding_on_its_known_labels() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(200, 30))
    targets = np.stack([pixels[:, 0] > 0, pixels[:, 1] > 0, pixels[:, 2] > 0], axis=1).astype(float)
    targets[50:, 1], targets[:, 2] = np.nan, np.nan
    ridge = PixelRidge(pixels)
    predicted = ridge.fit(targets[:150], np.arange(150)).predict(pixels[150:])
    alone = ridge.fit(targets[:50, 1:2], np.arange(50)).predict(pixels[150:])
    np.testing.assert_allclose(predicted[:, 1], alone[:, 0])
    assert np.corrcoef(predicted[:, 0], pixels[150:, 0])[0, 1] > 0.8
    assert (predicted[:, 2] == 0).all()


def test_pixel_ridge_leaves_out_the_few_unknown_rows_and_keeps_its_fits() -> None:
    rng = np.random.default_rng(1)
    pixels = rng.normal(size=(200, 30))
    targets = (pixels[:, :2] + rng.normal(size=(200, 2)) > 0).astype(float)
    targets[:10, 1] = np.nan
    ridge = PixelRidge(pixels)
    fitted = ridge.fit(targets)
    assert ridge.fit(targets.copy()) is fitted
    assert ridge.fit(targets[:100], np.arange(100)) is not fitted
    inputs = StandardScaler().fit_transform(pixels)
    whole = RidgeCV(ALPHAS).fit(inputs, targets[:, 0])
    np.testing.assert_allclose(fitted.predict(pixels)[:, 0], whole.predict(inputs))
    part = [Ridge(alpha).fit(inputs[10:], targets[10:, 1]).predict(inputs) for alpha in ALPHAS]
    assert any(np.allclose(fitted.predict(pixels)[:, 1], scores) for scores in part)


def test_report_words_are_unit_vectors_that_share_a_space() -> None:
    split = make_split("train", 200, 3)
    words = ReportWords(split.ridge, np.arange(150), split.reports[:150])
    images, texts = words.images(split.arrays.pixels[150:]), words.texts(split.reports[150:])
    np.testing.assert_allclose(np.linalg.norm(images, axis=1), 1)
    np.testing.assert_allclose(np.linalg.norm(texts, axis=1), 1)
    assert (images * texts).sum(axis=1).mean() > (images * np.roll(texts, 1, axis=0)).sum(axis=1).mean() + 0.1
