"""What is drawn of kept scores: ROC, precision and recall, calibration, confusion at the thresholds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from markupsafe import Markup

from medvlp.evaluation.metrics import curves
from medvlp.evaluation.metrics.curves import Curve
from medvlp.evaluation.report import scores as files
from medvlp.evaluation.report import tables
from medvlp.evaluation.report.curves import OWN, Lines, lines_of
from medvlp.evaluation.report.results import Evaluation
from medvlp.evaluation.task import EvaluationError, Scores, tasks
from medvlp.run_page.charts import line_chart
from medvlp.run_page.history import without_places
from medvlp.run_page.tables import Cell, TableOf

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
            part.remarks.append(f"{name}: no curves: {without_places(str(error))}")
    if not kept:
        return part
    findings = [name for name in next(iter(kept.values())).findings
                if all(name in of.findings for of in kept.values())]  # fmt: skip
    if not findings:
        part.remarks.append("No curves: there is no finding of which all runs have scores.")
        return part
    if unit != "whole":
        part.remarks.append(f"Curves of {unit}.")
    if any(len(of.findings) > len(findings) for of in kept.values()):
        part.remarks.append(f"Curves over the findings that all runs have: {', '.join(findings)}.")
    _draw(part, {name: _narrowed(of, findings) for name, of in kept.items()})
    for name, of in kept.items():
        part.tables.extend(_called(name, of))
    return part


def _narrowed(scores: Scores, findings: Sequence[str]) -> Scores:
    columns = [list(scores.findings).index(name) for name in findings]
    models = {model: of[:, columns] for model, of in scores.models.items()}
    return replace(scores, findings=list(findings), truth=scores.truth[:, columns], models=models)


def _draw(part: CurvePart, kept: Mapping[str, Scores]) -> None:
    """The curves of one run's models, or of the trained networks of several runs."""
    drawn: dict[str, tuple[Lines, dict[str, Curve], dict[str, dict[str, Curve]]]] = {}
    for name, of in kept.items():
        shown = of if len(kept) == 1 else replace(of, models={m: s for m, s in of.models.items() if m == OWN})
        said = {model: tables.model_name(model) if len(kept) == 1 else name for model in shown.models}
        for lines in lines_of(shown):
            _, whole, findings = drawn.setdefault(lines.heading, (lines, {}, {}))
            errors = {model: f" (error {error:.3f})" for model, error in lines.errors.items()}
            whole |= {said[model] + errors.get(model, ""): curve for model, curve in lines.whole.items()}
            for finding, models in lines.findings.items():
                findings.setdefault(finding, {}).update({said[m]: curve for m, curve in models.items()})
    for heading, (lines, whole, findings) in drawn.items():
        over = "mean over findings" if findings else "all findings together"
        part.charts.append(_chart(f"{heading}, {over}", lines, whole))
        part.findings += [_chart(f"{finding}: {heading}", lines, of) for finding, of in findings.items()]
    if not any(of.log_odds for of in kept.values()):
        part.remarks.append("No calibration: these scores order images and are no probabilities.")


def _chart(heading: str, lines: Lines, of: Mapping[str, Curve]) -> Chart:
    points = {name: (curve.x.tolist(), curve.y.tolist()) for name, curve in of.items()}
    # matplotlib escapes every text it writes.
    return heading, Markup(line_chart(heading, points, (), lines.axes, True, lines.diagonal))


def _called(name: str, scores: Scores) -> list[TableOf]:
    """Of the trained network: confusion of exclusive findings, and of each finding at its threshold."""
    own, made = scores.models.get(OWN), []
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
        threshold = scores.thresholds.get(OWN, {}).get(finding)
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
