"""Labels as the metrics need them: which samples count for a finding, and which findings can be evaluated."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
#: What becomes of uncertain labels (-1): left out of that finding, or counted as one side.
Uncertain = Literal["exclude", "positive", "negative"]

#: Fewest positives and fewest negatives for which a metric of a finding is reported.
FEWEST = 2


@dataclass(frozen=True)
class NotEvaluable:
    """A finding that gets no number, and why; it is listed beside the results."""

    finding: str
    reason: str


@dataclass(frozen=True)
class Count:
    """Samples of a finding: `excluded` ones are uncertain or have no label."""

    positives: int
    negatives: int
    excluded: int


def binary(labels: NDArray[Any], uncertain: Uncertain = "exclude") -> Floats:
    """[N, C] stored labels (1, 0, -1 uncertain, NaN unknown) -> [N, C] of 1, 0 and NaN (does not count)."""
    side = {"exclude": np.nan, "positive": 1.0, "negative": 0.0}[uncertain]
    return np.where(labels == -1, side, labels.astype(np.float64))


def counts(truth: Floats, names: Sequence[str]) -> dict[str, Count]:
    """Positives, negatives and excluded samples of each finding in [N, C] labels of `binary`."""
    return {
        name: Count(int((column == 1).sum()), int((column == 0).sum()), int(np.isnan(column).sum()))
        for name, column in zip(names, truth.T, strict=True)
    }


def not_evaluable(
    truth: Floats, names: Sequence[str], split: str, fewest: int = FEWEST
) -> list[NotEvaluable]:
    """Findings with fewer than `fewest` positives or negatives in [N, C] labels of `binary`."""
    listed = []
    for name, count in counts(truth, names).items():
        if min(count.positives, count.negatives) < fewest:
            found = f"{count.positives} positives and {count.negatives} negatives in {split}"
            listed.append(NotEvaluable(name, f"{found}, needs {fewest} of each"))
    return listed


def as_notes(truth: Floats, names: Sequence[str], listed: Sequence[NotEvaluable]) -> dict[str, object]:
    """The counts and the unevaluable findings as the result file shows them."""
    return {
        "counts": {name: asdict(count) for name, count in counts(truth, names).items()},
        "not_evaluable": [asdict(item) for item in listed],
    }
