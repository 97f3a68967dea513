"""The curves that people look at of the scores of a task, for the page and for W&B."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from medvlp.evaluation.metrics import curves
from medvlp.evaluation.metrics.curves import Curve
from medvlp.evaluation.task import Scores

#: The network of the run; the other models of an evaluation are what it is compared with.
OWN = "trained"


@dataclass(frozen=True)
class Lines:
    """One kind of curve.

    Attributes:
        heading: what it is. axes: what x and y are; both go from 0 to 1.
        diagonal: whether the line from corner to corner means something (chance, or what is said is so).
        whole: model -> its curve over all findings. findings: finding -> model -> curve of that finding.
        errors: of calibration, model -> expected calibration error.
    """

    heading: str
    axes: tuple[str, str]
    diagonal: bool
    whole: Mapping[str, Curve]
    findings: Mapping[str, Mapping[str, Curve]] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)


def lines_of(scores: Scores) -> list[Lines]:
    """ROC, precision and recall, and of models that say probabilities their calibration."""
    # One order, and so one colour, in every plot: a file does not keep it.
    models = sorted(scores.models.items(), key=lambda item: (item[0] != OWN, item[0]))
    rocs = {model: curves.roc(of, scores.truth) for model, of in models}
    recalls = {model: curves.precision_recall(of, scores.truth) for model, of in models}
    calibrated = {}
    for model, of in models:
        if model in scores.log_odds:
            said = curves.probabilities(of, scores.exclusive)
            calibrated[model] = curves.calibration(said, scores.truth)
    found = [
        Lines(
            "ROC", ("false-positive rate", "true-positive rate"), True,
            {model: curves.mean_roc(of) for model, of in rocs.items() if of}, _by_finding(scores, rocs),
        ),
        Lines(
            "Precision and recall", ("recall", "precision"), False,
            {model: curves.mean_precision(of) for model, of in recalls.items() if of},
            _by_finding(scores, recalls),
        ),
    ]  # fmt: skip
    if calibrated:
        axes = ("said probability", "share of positives")
        points = {model: curve for model, (curve, _) in calibrated.items()}
        errors = {model: error for model, (_, error) in calibrated.items()}
        found.append(Lines("Calibration", axes, True, points, errors=errors))
    return found


def _by_finding(scores: Scores, of: Mapping[str, Mapping[int, Curve]]) -> dict[str, dict[str, Curve]]:
    found = {
        finding: {model: own[column] for model, own in of.items() if column in own}
        for column, finding in enumerate(scores.findings)
    }
    return {finding: models for finding, models in found.items() if models}
