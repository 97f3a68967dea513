"""Reports without a network: those of training samples, chosen by the image, by chance or by what is true."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medvlp.evaluation.prompts import is_normal_label

#: Cosines that are held at a time.
_CELLS = 1 << 24
#: In place of a label that is not known, so that it is equal to another such.
_UNKNOWN = 2.0


@dataclass(frozen=True)
class Baselines:
    """Reports of training samples: position -> words; and which of them each baseline writes.

    Attributes:
        reports: N reports. features: [N, F] of unit norm, of their images. normal: the normal report.
        labels: [N, C] of their images, as stored.
        normals: reports of normal images, of which `normal` is the most frequent; 0: it is none of theirs.
    """

    reports: list[str]
    features: NDArray[np.float64]
    normal: str
    labels: NDArray[Any]
    normals: int = 0

    def written(self, features: NDArray[Any], labels: NDArray[Any], seed: int) -> dict[str, list[str]]:
        """Baseline -> reports of images with features [M, F] and labels [M, C]."""
        commonest = Counter(self.reports).most_common(1)[0][0]
        drawn = np.random.default_rng(seed).integers(0, len(self.reports), len(features))
        told = self._alike(labels, seed) if labels.shape[1] else []
        return {
            "most-frequent": [commonest] * len(features),
            "random": [self.reports[i] for i in drawn],
            "nearest-image": [self.reports[i] for i in self._nearest(unit_rows(features))],
            "normal": [self.normal] * len(features),
        } | ({"same-findings": [self.reports[i] for i in told]} if labels.shape[1] else {})

    def _nearest(self, features: NDArray[np.float64]) -> list[int]:
        """Of each image the training image with the highest cosine; of equal ones the first."""
        block = max(1, _CELLS // len(self.reports))
        return [
            int(row)
            for start in range(0, len(features), block)
            for row in (features[start : start + block] @ self.features.T).argmax(axis=1)
        ]

    def _alike(self, labels: NDArray[Any], seed: int) -> list[int]:
        """Of each image one of the reports with the most labels in common."""
        # Few sets of findings stand for many reports.
        sets, kind = np.unique(np.nan_to_num(self.labels, nan=_UNKNOWN), axis=0, return_inverse=True)
        found = []
        for row, of in enumerate(np.nan_to_num(labels, nan=_UNKNOWN)):
            agree = (sets == of).sum(axis=1)
            best = np.flatnonzero((agree == agree.max())[kind.ravel()])
            found.append(int(np.random.default_rng([seed, row]).choice(best)))
        return found


def is_normal(labels: NDArray[Any], names: Sequence[str]) -> bool:
    """Whether an image is known to show no finding.

    Where the dataset has a label that says so ("No Finding", "normal"), it has to be 1 and no finding 1 or
    uncertain; else all findings have to be 0.

    Args:
        labels: [C] 1, 0, -1 or NaN. names: of the labels; those like "sex=M" are no findings.
    """
    says_normal = np.array([is_normal_label(name) for name in names], dtype=bool)
    findings = labels[~says_normal & np.array(["=" not in name for name in names], dtype=bool)]
    if says_normal.any():
        return bool((labels[says_normal] == 1).any() and not np.isin(findings, (1, -1)).any())
    return bool(len(findings) and (findings == 0).all())


def unit_rows(features: NDArray[Any]) -> NDArray[np.float64]:
    """Rows of unit norm; a row of zeros stays."""
    wide = np.asarray(features, dtype=np.float64)
    norm = np.linalg.norm(wide, axis=1, keepdims=True)
    result: NDArray[np.float64] = wide / np.where(norm > 0, norm, 1.0)
    return result
