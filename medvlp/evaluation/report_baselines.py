"""Reports without a network: those of training samples, chosen by the image, by chance or by what is true."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Baselines:
    """Reports of training samples: position -> words; and which of them each baseline writes.

    Attributes:
        reports: N reports. features: [N, F] of unit norm, of their images. normal: the normal report.
        labels: [N, C] of their images, as stored.
    """

    reports: list[str]
    features: NDArray[np.float64]
    normal: str
    labels: NDArray[Any]

    def written(self, features: NDArray[Any], labels: NDArray[Any], seed: int) -> dict[str, list[str]]:
        """Baseline -> reports of images with features [M, F] and labels [M, C]."""
        commonest = Counter(self.reports).most_common(1)[0][0]
        drawn = np.random.default_rng(seed).integers(0, len(self.reports), len(features))
        # Ties: the first.
        nearest = (unit_rows(features) @ self.features.T).argmax(axis=1)
        told = [self._alike(of, np.random.default_rng([seed, row])) for row, of in enumerate(labels)]
        return {
            "most-frequent": [commonest] * len(features),
            "random": [self.reports[i] for i in drawn],
            "nearest-image": [self.reports[i] for i in nearest],
            "normal": [self.normal] * len(features),
        } | ({"same-findings": [self.reports[i] for i in told]} if labels.shape[1] else {})

    def _alike(self, labels: NDArray[Any], rng: np.random.Generator) -> int:
        """One of the reports with the most labels in common."""
        agree = (np.nan_to_num(self.labels, nan=2.0) == np.nan_to_num(labels, nan=2.0)).sum(axis=1)
        return int(rng.choice(np.flatnonzero(agree == agree.max(initial=0))))


def unit_rows(features: NDArray[Any]) -> NDArray[np.float64]:
    """Rows of unit norm; a row of zeros stays."""
    wide = np.asarray(features, dtype=np.float64)
    norm = np.linalg.norm(wide, axis=1, keepdims=True)
    result: NDArray[np.float64] = wide / np.where(norm > 0, norm, 1.0)
    return result
