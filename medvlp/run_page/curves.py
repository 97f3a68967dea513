"""What is drawn of kept scores: ROC, precision and recall, calibration, confusion at the thresholds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from markupsafe import Markup

from medvlp.evaluation.metrics import curves
from medvlp.evaluation.metrics.curves import Curve
from medvlp.evaluation.report import scores as files
from medvlp.evaluation.report import tables
from medvlp.evaluation.report.results import Evaluation
from medvlp.evaluation.task import EvaluationError, Scores, tasks
from medvlp.run_page.charts import line_chart
from medvlp.run_page.tables import Cell, TableOf

#: The network of the run; the other models of an evaluation are what it is compared with.
_OWN = "trained"
Chart = tuple[str, Markup]


@dataclass
class CurvePart:
    """Curves of one task: over all findings, and folded away of single ones; `tables` of who was called."""

    charts: list[Chart] = field(default_factory=list)
    findings: list[Chart] = field(default_factory=list)
    tables: list[TableOf] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def curve_part(evaluations: Mapping[str, tuple[Path, Evaluation]], task: str) -> CurvePart | None:
    """The curves of a task of runs evaluated on the same data; None for a task that keeps no scores.

    Where a task has several units, those of the last one are drawn.

    Args:
        evaluations: name -> run folder and evaluation, which has the task.
    """
    kind = tasks().get(task)
    if kind is None or not kind.keeps_scores:
        return None
    part, kept = CurvePart(), dict[str, Scores]()
    units = [unit for _, one in evaluations.values() for unit in list(one.scores.get(task, {}))[-1:]]
    unit = units[0] if units else "whole"
    for name, (run, one) in evaluations.items():
        if not one.results[task]:
            continue  # the method cannot do the task, which the table says
        try:
            kept[name] = files.read(run, one, task, unit)
        except EvaluationError as error:
            part.remarks.append(f"{name}: no curves: {error}")
    if not kept:
        return part
    findings = [name for name in next(iter(kept.values())).findings
                if all(name in of.findings for of in kept.values())]  # fmt: skip
    if unit != "whole":
        part.remarks.append(f"Curves of {unit}.")
    if any(len(of.findings) > len(findings) for of in kept.values()):
        part.remarks.append(f"Curves over the findings that all runs have: {', '.join(findings)}.")
    _draw(part, {name: _narrowed(of, findings) for name, of in kept.items()}, findings)
    for name, of in kept.items():
        part.tables.extend(_called(name, of))
    return part


def _narrowed(scores: Scores, findings: Sequence[str]) -> Scores:
    columns = [list(scores.findings).index(name) for name in findings]
    return Scores(
        scores.sample, list(findings), scores.truth[:, columns],
        {model: of[:, columns] for model, of in scores.models.items()},
        scores.thresholds, scores.log_odds, scores.exclusive,
    )  # fmt: skip


def _draw(part: CurvePart, kept: Mapping[str, Scores], findings: Sequence[str]) -> None:
    rocs, recalls, calibrated = {}, {}, dict[str, Curve]()
    for name, of in kept.items():
        for model, scores in of.models.items():
            line = tables.model_name(model) if len(kept) == 1 else f"{name}: {tables.model_name(model)}"
            if len(kept) > 1 and model != _OWN:
                continue
            rocs[line] = curves.roc(scores, of.truth)
            recalls[line] = curves.precision_recall(scores, of.truth)
            if model in of.log_odds:
                said = curves.probabilities(scores, of.exclusive)
                points, error = curves.calibration(said, of.truth)
                calibrated[f"{line} (error {error:.3f})"] = points
    _draw_of(part, findings, rocs, curves.mean_roc, "ROC", ("false-positive rate", "true-positive rate"))
    _draw_of(part, findings, recalls, curves.mean_precision, "Precision and recall", ("recall", "precision"))
    if calibrated:
        axes = ("said probability", "share of positives")
        part.charts.append(_chart("Calibration, all findings together", calibrated, axes))
    else:
        part.remarks.append("No calibration: these scores order images and are no probabilities.")


def _draw_of(
    part: CurvePart,
    findings: Sequence[str],
    lines: Mapping[str, Mapping[int, Curve]],
    mean: Callable[[Mapping[int, Curve]], Curve],
    heading: str,
    axes: tuple[str, str],
) -> None:
    """One kind of curve: the mean over findings, then each finding."""
    whole = {name: mean(of) for name, of in lines.items() if of}
    part.charts.append(_chart(f"{heading}, mean over findings", whole, axes))
    for column, finding in enumerate(findings):
        if own := {name: of[column] for name, of in lines.items() if column in of}:
            part.findings.append(_chart(f"{finding}: {heading}", own, axes))


def _chart(heading: str, of: Mapping[str, Curve], axes: tuple[str, str]) -> Chart:
    diagonal = axes[0] != "recall"
    lines = {name: (line.x.tolist(), line.y.tolist()) for name, line in of.items()}
    # matplotlib escapes every text it writes.
    return heading, Markup(line_chart(heading, lines, axes=axes, unit_square=True, diagonal=diagonal))


def _called(name: str, scores: Scores) -> list[TableOf]:
    """Of the trained network: confusion of exclusive findings, and of each finding at its threshold."""
    own, made = scores.models.get(_OWN), []
    if own is None:
        return []
    if scores.exclusive:
        counts = curves.class_confusion(own, scores.truth)
        rows = [[Cell(finding), *(Cell(str(count), float(count)) for count in row)]
                for finding, row in zip(scores.findings, counts, strict=True)]  # fmt: skip
        made.append(TableOf(f"{name}: images of the class (rows) by highest score (columns)",
                            ["class", *scores.findings], rows, folded="confusion matrix"))  # fmt: skip
    rows = []
    for column, finding in enumerate(scores.findings):
        threshold = scores.thresholds.get(_OWN, {}).get(finding)
        if threshold is None:
            continue
        found = curves.confusion(own[:, column], scores.truth[:, column], threshold)
        shares = [_share(found.present_called, found.present_not_called),
                  _share(found.absent_not_called, found.absent_called)]  # fmt: skip
        rows.append([Cell(finding), *(Cell(f"{count:,}", float(count)) for count in found),
                     *shares, Cell(f"{threshold:.3g}", threshold)])  # fmt: skip
    if rows:
        header = ["finding", "present, called", "present, not called", "absent, called",
                  "absent, not called", "sensitivity", "specificity", "threshold"]  # fmt: skip
        made.append(TableOf(f"{name}: images at the threshold of each finding", header, rows,
                            folded="confusion at the thresholds"))  # fmt: skip
    return made


def _share(part: int, rest: int) -> Cell:
    if part + rest == 0:
        return Cell("–")
    value = float(np.divide(part, part + rest))
    return Cell(f"{value:.3f}", value)
