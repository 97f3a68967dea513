"""What a method has to beat: ridge regression on 32x32 pixels, for labels and for report words.

The other baseline, the untrained network, is the method before its first step (`session.py` builds it).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from sklearn.preprocessing import StandardScaler

Floats = NDArray[np.float64]

#: Strengths of the penalty to choose from; pixels are standardised, so the range fits any image source.
ALPHAS = tuple(10.0**power for power in range(7))
#: Share of known rows from which on targets choose their penalties together.
TOGETHER = 0.9
#: Most frequent words and word pairs of the training reports that the TF-IDF vectors hold.
VOCABULARY = 2048
#: Most training reports that the pixels are taught with: their vectors, and RidgeCV's copies, lie in memory.
MOST_REPORTS = 1 << 15


@dataclass(frozen=True)
class FittedRidge:
    """Linear predictions from pixels: `weights` [P, C] and `intercepts` [C] for standardised pixels."""

    scaler: StandardScaler
    weights: Floats
    intercepts: Floats

    def predict(self, pixels: NDArray[Any]) -> Floats:
        """[M, C] predictions from [M, P] pixels; columns without any known target are 0."""
        predicted: Floats = self.scaler.transform(pixels.astype(np.float64)) @ self.weights + self.intercepts
        return predicted


class PixelRidge:
    """Linear regression on the standardised pixels of one split, each target with a penalty of its own.

    The penalty is the best by leave-one-out error. Targets known in nearly all rows choose theirs together,
    unknown values at the mean of the known ones, so the pixels are decomposed once and not once a target.
    The regression itself always leaves a target's unknown rows out. Fits are kept: tasks ask for the same.
    """

    def __init__(self, pixels: NDArray[Any]):
        """`pixels` [N, P] of the training split set mean and scale (they need no label)."""
        from sklearn.preprocessing import StandardScaler  # here: 2 s that `medvlp --help` need not wait

        self._scaler = StandardScaler()
        self._inputs = self._scaler.fit_transform(pixels.astype(np.float64))
        self._fitted: dict[str, FittedRidge] = {}

    def fit(self, targets: Floats, rows: NDArray[np.int64] | None = None) -> FittedRidge:
        """Fit [n, C] targets (NaN: unknown) of the n `rows` of the split (default: all N of them)."""
        rows = np.arange(len(self._inputs)) if rows is None else rows
        digest = hashlib.sha256(str(targets.shape).encode())
        for array in (rows, targets):
            digest.update(np.ascontiguousarray(array).data)
        key = digest.hexdigest()
        if key not in self._fitted:
            self._fitted[key] = FittedRidge(self._scaler, *_ridge(self._inputs[rows], targets))
        return self._fitted[key]


def _ridge(inputs: Floats, targets: Floats) -> tuple[Floats, Floats]:
    """Weights [P, C] and intercepts [C]; see `PixelRidge`."""
    from sklearn.linear_model import Ridge, RidgeCV

    labelled = (~np.isnan(targets)).any(axis=1)
    inputs, targets = inputs[labelled], targets[labelled]
    known = ~np.isnan(targets)
    weights, intercepts = np.zeros((inputs.shape[1], targets.shape[1])), np.zeros(targets.shape[1])
    together = np.flatnonzero(known.any(axis=0) & (known.mean(axis=0) >= TOGETHER))
    penalties: dict[Any, float] = {}
    if len(together):
        some = targets[:, together]
        filled = np.where(known[:, together], some, np.nanmean(some, axis=0))
        chosen = RidgeCV(ALPHAS, alpha_per_target=True).fit(inputs, filled)
        weights[:, together] = np.atleast_2d(chosen.coef_).T
        intercepts[together] = chosen.intercept_
        penalties = dict(zip(together, np.broadcast_to(chosen.alpha_, len(together)), strict=True))
    for column in np.flatnonzero(known.any(axis=0) & ~known.all(axis=0)):
        rows = known[:, column]
        alone = Ridge(penalties[column], solver="cholesky") if column in penalties else RidgeCV(ALPHAS)
        alone.fit(inputs[rows], targets[rows, column])
        weights[:, column], intercepts[column] = alone.coef_, alone.intercept_
    return weights, intercepts


class ReportWords:
    """Retrieval without a network: images and reports as unit vectors in the space of report words.

    A report is its TF-IDF vector minus the training mean; an image is the ridge prediction of that vector
    from its pixels. (Without the mean taken off, the most ordinary reports would rank first for every image.)
    """

    def __init__(self, ridge: PixelRidge, rows: NDArray[np.int64], reports: Sequence[str]):
        """`ridge` is of the training pixels; `rows` [n] are those with a report, `reports` their n texts."""
        from sklearn.feature_extraction.text import TfidfVectorizer

        self._words = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), max_features=VOCABULARY)
        targets = self._words.fit_transform(reports).toarray()
        self._mean = targets.mean(axis=0)
        self._ridge = ridge.fit(targets - self._mean, rows)

    def images(self, pixels: NDArray[Any]) -> Floats:
        """[M, P] pixels -> [M, V] unit vectors; the inner product with `texts` is the cosine similarity."""
        from sklearn.preprocessing import normalize

        vectors: Floats = normalize(self._ridge.predict(pixels))
        return vectors

    def texts(self, reports: Sequence[str]) -> Floats:
        """M reports -> [M, V] unit vectors."""
        from sklearn.preprocessing import normalize

        vectors: Floats = normalize(self._words.transform(reports).toarray() - self._mean)
        return vectors
