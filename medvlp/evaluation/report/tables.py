"""Evaluations as text: tables for the console and in Markdown, and the lines under them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from medvlp.evaluation.metrics.bootstrap import Estimate
from medvlp.evaluation.report.comparison import Grid, grid, reading_of, unavailable, unlike
from medvlp.evaluation.report.differences import Row
from medvlp.evaluation.report.results import Evaluation
from medvlp.evaluation.task import EvaluationError, Reading

#: Models and metrics of `medvlp.evaluation.metrics` for people; a task's `Reading` names its own.
_NAMES = {
    "pixels": "32×32-pixel ridge",
    "auroc": "AUROC",
    "pr_auc": "PR-AUC",
    "f1": "F1",
}


def console_table(of: Grid, title: str) -> Table:
    """A rich table with a row for each metric and a column for each model.

    A grid of one metric (`Grid.by_finding`) has a row for each finding, and the metric above them.
    """
    prefix = f"{of.reading.by_finding}/"
    single = all(metric.startswith(prefix) and not of.reading.summary(metric) for metric in of.metrics)
    table = Table(title=escape(title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    header = f"{label(prefix[:-1], of.reading)} by finding" if single else "metric"
    table.add_column(header, no_wrap=True)
    for model in of.cells:
        table.add_column(escape(_NAMES.get(model, model)), justify="right")
    for metric in of.metrics:
        name = label(metric.removeprefix(prefix) if single else metric, of.reading)
        cells = (cell(metrics.get(metric), metric, of.reading) for metrics in of.cells.values())
        table.add_row(escape(name), *cells)
    return table


def markdown_table(of: Grid) -> str:
    """A Markdown table with a row for each model and a column for each metric."""
    rows = [["model", *(label(metric, of.reading) for metric in of.metrics)]]
    for model, metrics in of.cells.items():
        cells = (cell(metrics.get(metric), metric, of.reading) for metric in of.metrics)
        rows.append([_NAMES.get(model, model), *cells])
    return markdown_rows(rows)


def markdown_rows(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its header, all columns but the first are aligned right."""
    header, *others = rows
    ruler = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ruler, *others)) + "\n"


def published_cells(task: str, metric: str, own: Estimate, value: float, by: str) -> list[str]:
    """A row of the table of published results."""
    reading = reading_of(task)
    return [task, label(metric, reading), cell(own, metric, reading), f"{value:.3f}", by]


def published_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A rich table of published results."""
    return rows_table(header, rows, "published results")


def rows_table(header: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> Table:
    """A rich table of texts."""
    names = map(escape, header)
    table = Table(*names, title=escape(title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def difference_rows(of: Mapping[tuple[str, str], Sequence[Row]], reading: Reading) -> list[list[str]]:
    """Rows of a table of differences, the first its header; what the interval claims is starred."""
    rows = [["runs", "metric", "with", "without", "difference (95 %)", "seeds"]]
    for (ours, theirs), found in of.items():
        for row in found:
            values = [cell(Estimate(value), row.metric, reading) for value in (row.ours, row.theirs)]
            difference = row.difference
            text = f"{difference.value:+.3f}"
            if difference.low is not None and difference.high is not None:
                text += f" ({difference.low:+.3f} to {difference.high:+.3f})"
            star = " *" if difference.claimed else ""
            name = f"{ours} − {theirs}"
            rows.append([name, label(row.metric, reading), *values, text + star, str(difference.seeds)])
    return rows


def caption(evaluations: Mapping[str, Evaluation]) -> str:
    """What all tables of these evaluations are of: dataset, split, and what the intervals mean."""
    data = next(iter(evaluations.values())).data
    return f"{data['name']}, split {data['split']}, 95 % intervals by patient"


def markdown_section(evaluations: Mapping[str, Evaluation], task: str, findings: bool = False) -> str:
    """One task as Markdown: its tables (also of single findings) and the remarks under them."""
    grids = [grid(evaluations, task)] + ([grid(evaluations, task, findings=True)] if findings else [])
    tables = [f"{task}: {caption(evaluations)}\n\n{markdown_table(of)}" for of in grids if of.metrics]
    lines = lines_under(evaluations, task)
    return "\n".join([*tables, *(f"- {line}" for line in lines)]) + "\n"


def lines_under(evaluations: Mapping[str, Evaluation], task: str) -> list[str]:
    """What stands under the tables of a task.

    All evaluations are of the same data, so what one cannot say about it none can; where one was measured
    otherwise, a line says so.
    """
    notes = next(iter(evaluations.values())).notes[task]
    return remarks(task, notes) + unavailable(evaluations, task) + unlike(evaluations, task)


def cell(estimate: Estimate | None, metric: str, reading: Reading) -> str:
    """ "0.812 (0.78–0.84)"; whole numbers without decimals; "–" where there is no number."""
    if estimate is None or math.isnan(estimate.value):
        return "–"
    digits = 0 if reading.whole & set(metric.split("/")) else 3
    text = f"{estimate.value:.{digits}f}"
    if estimate.low is None or estimate.high is None:
        return text
    digits = max(digits - 1, 0)
    return f"{text} ({estimate.low:.{digits}f}–{estimate.high:.{digits}f})"


def remarks(task: str, notes: Mapping[str, Any]) -> list[str]:
    """What has to stand under a task's table: what it says itself, baselines, findings without a number.

    Raises:
        EvaluationError: the notes are not what the task writes.
    """
    try:
        return _remarks(task, notes)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # Notes are the task's own, and each reads only what it needs.
        raise EvaluationError(
            f"{task}: the notes of its result are not as this program writes them: evaluate it again"
        ) from error


def _remarks(task: str, notes: Mapping[str, Any]) -> list[str]:
    lines = [f"left out: {notes['left_out']}"] if notes.get("left_out") else []
    lines += reading_of(task).remarks(notes)
    if "pixels" in notes:
        lines.append(f"pixel baseline: {notes['pixels']}")
    reasons: dict[str, list[str]] = {}
    for item in notes.get("not_evaluable", []):
        reasons.setdefault(item["reason"], []).append(item["finding"])
    return lines + [f"no number for {', '.join(found)}: {reason}" for reason, found in reasons.items()]


def model_name(model: str) -> str:
    """A model's column for people."""
    return _NAMES.get(model, model)


def label(metric: str, reading: Reading) -> str:
    """A metric for people: "image_to_text/P@5/macro" -> "image→text P@5 macro"."""
    known = {**_NAMES, **reading.names}
    words = []
    for part in metric.split("/"):
        name, at, share = part.partition("@")
        words.append(known.get(name, name) + (f" {share}" if at and "%" in share else at + share))
    return " ".join(words)
