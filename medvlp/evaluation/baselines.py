"""What a method has to beat: ridge regression on 32x32 pixels, for labels and for report words.

The other baseline, the untrained network, is the method itself before its first step (`run.py` builds it).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import RidgeCV
from sklearn.preprocessing import StandardScaler, normalize

Floats = NDArray[np.float64]

#: Strengths of the penalty to choose from; pixels are standardised, so the range fits any image source.
ALPHAS = tuple(10.0**power for power in range(7))
#: Most frequent words and word pairs of the training reports that the TF-IDF vectors hold.
VOCABULARY = 2048


class PixelRidge:
    """Linear regression on standardised pixels; the penalty is the best by leave-one-out error."""

    def __init__(self, pixels: NDArray[Any]):
        """`pixels` [N, P] of the training split set mean and scale (they need no label)."""
        self._scaler = StandardScaler().fit(pixels.astype(np.float64))
        self._targets = 0
        self._fitted: list[tuple[NDArray[np.int64], RidgeCV]] = []

    def fit(self, pixels: NDArray[Any], targets: Floats) -> Self:
        """Fit [N, C] targets of [N, P] pixels, each on the rows where it is known (not NaN)."""
        inputs = self._scaler.transform(pixels.astype(np.float64))
        known = ~np.isnan(targets)
        # Targets with the same known rows share one decomposition of the inputs.
        patterns, pattern_of = np.unique(known, axis=1, return_inverse=True)
        self._targets = targets.shape[1]
        self._fitted = []
        for number, rows in enumerate(patterns.T):
            columns = np.flatnonzero(pattern_of.ravel() == number)
            if rows.any():
                self._fitted.append(
                    (columns, RidgeCV(ALPHAS).fit(inputs[rows], targets[np.ix_(rows, columns)]))
                )
        return self

    def predict(self, pixels: NDArray[Any]) -> Floats:
        """[M, C] predictions from [M, P] pixels; columns without any known target are 0."""
        inputs = self._scaler.transform(pixels.astype(np.float64))
        predicted = np.zeros((len(pixels), self._targets))
        for columns, ridge in self._fitted:
            predicted[:, columns] = ridge.predict(inputs).reshape(len(pixels), -1)
        return predicted


def report_embeddings(
    pixels: NDArray[Any], reports: Sequence[str], test_pixels: NDArray[Any], test_reports: Sequence[str]
) -> tuple[Floats, Floats]:
    """Retrieval without a network: images and reports as unit vectors in the space of report words.

    A report is its TF-IDF vector minus the training mean; an image is the ridge prediction of that vector
    from its pixels. (Without the mean taken off, the most ordinary reports would rank first for every image.)

    Args:
        pixels: [N, P] training pixels; reports: the N training reports.
        test_pixels: [M, P]; test_reports: the M reports to rank.

    Returns:
        Image vectors [M, V] and report vectors [M, V]; the inner product is the cosine similarity.
    """
    words = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), max_features=VOCABULARY)
    targets = words.fit_transform(reports).toarray()
    mean = targets.mean(axis=0)
    images = PixelRidge(pixels).fit(pixels, targets - mean).predict(test_pixels)
    return normalize(images), normalize(words.transform(test_reports).toarray() - mean)
