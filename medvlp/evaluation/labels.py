"""Labels as the metrics need them: which samples count for a finding, and which findings can be evaluated."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from medvlp.evaluation.metrics.clinical import plain
from shards.errors import UsageError

Floats = NDArray[np.float64]
#: What becomes of uncertain labels (-1): left out of that finding, or counted as one side; per_class: as
#: published for CheXpert's five competition findings (`PER_CLASS`), others left out.
Uncertain = Literal["exclude", "positive", "negative", "per_class"]
#: What an unknown label counts as; auto: negative for CheXpert's labels, where it says "not mentioned".
Blank = Literal["auto", "exclude", "negative"]

#: MGCA's and GLoRIA's choice on CheXpert.
PER_CLASS = {
    "atelectasis": 1.0, "cardiomegaly": 0.0, "consolidation": 0.0, "edema": 1.0, "pleural effusion": 1.0,
}  # fmt: skip

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


def sides(uncertain: Uncertain, names: Sequence[str]) -> Floats:
    """[C] what an uncertain label of each finding counts as: 1, 0, or NaN (it is left out)."""
    if uncertain == "per_class":
        return np.array([PER_CLASS.get(plain(name), np.nan) for name in names])
    return np.full(len(names), {"exclude": np.nan, "positive": 1.0, "negative": 0.0}[uncertain])


def check_uncertain(uncertain: Uncertain, names: Sequence[str]) -> None:
    """Raise UsageError where per_class says nothing of any of the findings."""
    if uncertain == "per_class" and not {plain(name) for name in names} & PER_CLASS.keys():
        raise UsageError(f"--uncertain per_class is of {', '.join(PER_CLASS)}; none of them is evaluated")


def has_chexpert_labels(label_names: Sequence[str]) -> bool:
    """Whether a dataset has the 14 labels of CheXpert and MIMIC-CXR, told by those that no other set has."""
    return {"no finding", "support devices", "pleural other"} <= {plain(name) for name in label_names}


def blank_side(blank: Blank, label_names: Sequence[str]) -> float:
    """What an unknown label of a dataset counts as: 0, or NaN (it is left out)."""
    negative = has_chexpert_labels(label_names) if blank == "auto" else blank == "negative"
    return 0.0 if negative else float("nan")


def binary(labels: NDArray[Any], uncertain: Floats | float = np.nan, blank: float = np.nan) -> Floats:
    """[N, C] stored labels (1, 0, -1 uncertain, NaN unknown) -> [N, C] of 1, 0 and NaN (does not count).

    Args:
        labels: as stored. uncertain: [C] of `sides`, or one for all. blank: of `blank_side`.
    """
    stored = labels.astype(np.float64)
    return np.where(stored == -1, uncertain, np.where(np.isnan(stored), blank, stored))


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


def no_threshold(names: Sequence[str], chosen: Mapping[str, float], split: str) -> list[NotEvaluable]:
    """Of `names` those without a threshold, which `split` was to choose: only their F1 and accuracy miss."""
    reason = f"F1 and accuracy: no positives in {split} to choose a threshold by"
    return [NotEvaluable(name, reason) for name in names if name not in chosen]


def as_notes(truth: Floats, names: Sequence[str], listed: Sequence[NotEvaluable]) -> dict[str, object]:
    """The counts and the unevaluable findings as the result file shows them."""
    return {
        "counts": {name: asdict(count) for name, count in counts(truth, names).items()},
        "not_evaluable": [asdict(item) for item in listed],
    }
