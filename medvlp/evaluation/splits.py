"""What is known about the samples of a split, beside what the models make of their images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medvlp.evaluation.baselines import PixelRidge
from medvlp.evaluation.features import SplitArrays
from medvlp.evaluation.report.results import EvaluationError
from shards.errors import UsageError

#: Splits on which thresholds and penalties may be chosen, in this order; never the evaluated one.
SELECTION_ORDER = ("valid", "train")


@dataclass
class Split:
    """N samples of one split, in one order everywhere.

    Attributes:
        name: "train", "valid", "test", ...
        patients: [N] patient of each sample (decides resamples and label fractions; never written out).
        reports: N report texts of the configured sections, "" where there is none.
        labels: [N, C] stored labels in the order of the index: 1, 0, -1 (uncertain), NaN (unknown).
        arrays: embeddings, features and pixels.
    """

    name: str
    patients: NDArray[Any]
    reports: list[str]
    labels: NDArray[Any]
    arrays: SplitArrays

    @cached_property
    def ridge(self) -> PixelRidge:
        """The pixel baseline taught by this split, one for all tasks."""
        return PixelRidge(self.arrays.pixels)


def selection_split(available: Sequence[str], evaluated: str, trained_on: bool = False) -> str | None:
    """The split that chooses thresholds and penalties when `evaluated` is reported; None if there is none.

    `trained_on`: the choice is about a model fitted to the training labels, so it cannot be made on them.
    """
    for name in SELECTION_ORDER:
        if name in available and name != evaluated and not (trained_on and name == "train"):
            return name
    return None


def columns(label_names: Sequence[str], chosen: Sequence[str]) -> list[int]:
    """Positions of the chosen labels (all for none chosen).

    Raises:
        UsageError: the dataset has no such label.
        EvaluationError: it has none at all.
    """
    if not label_names:
        raise EvaluationError("the dataset has no labels; only the task retrieval can be evaluated on it")
    for name in chosen:
        if name not in label_names:
            raise UsageError(f"--label {name!r}: the dataset has {', '.join(label_names)}")
    return [label_names.index(name) for name in chosen] if chosen else list(range(len(label_names)))


def report_groups(reports: Sequence[str]) -> NDArray[np.int64]:
    """[N] numbers that are equal where report texts are equal but for case and white space."""
    plain = [" ".join(report.lower().split()) for report in reports]
    return np.unique(np.asarray(plain, dtype=object), return_inverse=True)[1].astype(np.int64)
