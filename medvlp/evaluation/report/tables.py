"""Tables of results: models side by side, from one evaluation or from several of the same data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from medvlp.evaluation.metrics.bootstrap import Estimate
from medvlp.evaluation.report.results import Evaluation, EvaluationError, Metrics

#: Models that hardly depend on the run: shown once when several evaluations have the same numbers for them.
SHARED_MODELS = ("pixels", "chance")
#: How models and metrics are named for people.
_NAMES = {
    "pixels": "32×32-pixel ridge",
    "auroc": "AUROC",
    "pr_auc": "PR-AUC",
    "f1": "F1",
    "accuracy": "accuracy",
    "image_to_text": "image→text",
    "text_to_image": "text→image",
    "median_rank": "median rank",
}


@dataclass
class Grid:
    """One task's numbers: `cells[model][metric]`, in the order to be shown."""

    task: str
    metrics: list[str]
    cells: dict[str, Metrics]


def grid(evaluations: Mapping[str, Evaluation], task: str, findings: bool = False) -> Grid:
    """Put one task of several evaluations side by side.

    Args:
        evaluations: evaluations by the name their models get in the table.
        task: "zero-shot", "retrieval" or "linear-probe".
        findings: rows for single findings (and accuracy, which rare findings make look high) instead of
            the summary.

    Raises:
        EvaluationError: an evaluation has no such task, or they are not of the same split of the same data.
    """
    first = next(iter(evaluations.values()))
    cells: dict[str, Metrics] = {}
    for name, evaluation in evaluations.items():
        same = all(evaluation.data[key] == first.data[key] for key in ("fingerprint", "split"))
        if not same or evaluation.settings["uncertain"] != first.settings["uncertain"]:
            raise EvaluationError(
                f"{name}: another dataset, split or treatment of uncertain labels than the first evaluation; "
                "evaluate all of them alike"
            )
        if task not in evaluation.results:
            raise EvaluationError(
                f"{name}: task {task} has not been evaluated (medvlp evaluate ... --task {task})"
            )
        # A method that cannot do the task at all has a row or column of dashes.
        for model, metrics in (evaluation.results[task] or {"trained": {}}).items():
            shared = len(evaluations) == 1 or (
                model in SHARED_MODELS and cells.get(model, metrics) == metrics
            )
            cells[model if shared else name if model == "trained" else f"{name}, {model}"] = metrics
    ordered = {row: cells[row] for row in sorted(cells, key=lambda row: row in SHARED_MODELS)}
    names = dict.fromkeys(metric for metrics in ordered.values() for metric in metrics)
    return Grid(task, [metric for metric in names if _is_summary(metric) != findings], ordered)


def auroc_by_finding(of: Grid) -> Grid:
    """The AUROC rows of a grid of single findings: the short table of zero-shot classification."""
    return Grid(of.task, [metric for metric in of.metrics if metric.startswith("auroc/")], of.cells)


def console_table(of: Grid, title: str) -> Table:
    """A rich table with a row for each metric (or finding) and a column for each model."""
    by_finding = _is_by_finding(of)
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("AUROC by finding" if by_finding else "metric", no_wrap=True)
    for model in of.cells:
        table.add_column(_NAMES.get(model, model), justify="right")
    for metric in of.metrics:
        name = label(metric.removeprefix("auroc/") if by_finding else metric)
        table.add_row(name, *(cell(metrics.get(metric), metric) for metrics in of.cells.values()))
    return table


def markdown_table(of: Grid) -> str:
    """A Markdown table with a row for each model and a column for each metric."""
    rows = [["model", *(label(metric) for metric in of.metrics)], ["---"] + ["---:"] * len(of.metrics)]
    for model, metrics in of.cells.items():
        rows.append([_NAMES.get(model, model), *(cell(metrics.get(metric), metric) for metric in of.metrics)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def caption(evaluations: Mapping[str, Evaluation]) -> str:
    """What all tables of these evaluations are of: dataset, split, and what the intervals mean."""
    data = next(iter(evaluations.values())).data
    return f"{data['name']}, split {data['split']}, 95 % intervals by patient"


def markdown_section(evaluations: Mapping[str, Evaluation], task: str, findings: bool = False) -> str:
    """One task as Markdown: its tables (also of single findings) and the remarks under them."""
    grids = [grid(evaluations, task)] + ([grid(evaluations, task, findings=True)] if findings else [])
    tables = [f"{task}: {caption(evaluations)}\n\n{markdown_table(of)}" for of in grids if of.metrics]
    # All evaluations are of the same data, so what one cannot say about it none can.
    notes = next(iter(evaluations.values())).notes[task]
    lines = remarks(notes) + unavailable(evaluations, task)
    return "\n".join([*tables, *(f"- {line}" for line in lines)]) + "\n"


def cell(estimate: Estimate | None, metric: str) -> str:
    """ "0.812 (0.78–0.84)"; ranks without decimals; "–" where there is no number."""
    if estimate is None or estimate.value is None:
        return "–"
    digits = 0 if "rank" in metric else 3
    text = f"{estimate.value:.{digits}f}"
    if estimate.low is None or estimate.high is None:
        return text
    digits = max(digits - 1, 0)
    return f"{text} ({estimate.low:.{digits}f}–{estimate.high:.{digits}f})"


def unavailable(evaluations: Mapping[str, Evaluation], task: str) -> list[str]:
    """What cannot be said about single models: "TASK of NAME: not available: the method ..."."""
    reasons = {name: evaluation.notes[task].get("not_available") for name, evaluation in evaluations.items()}
    return [f"{task} of {name}: not available: {reason}" for name, reason in reasons.items() if reason]


def remarks(notes: Mapping[str, Any]) -> list[str]:
    """What has to stand under a table: findings without a number, where thresholds come from, baselines."""
    lines = []
    if notes.get("left_out"):
        lines.append(f"left out: {notes['left_out']}")
    if "threshold_split" in notes:
        chosen = notes["threshold_split"]
        source = f"F1 and accuracy at the threshold with the best F1 on the split {chosen}"
        lines.append(source if chosen else "no F1 and accuracy: no other split to choose a threshold on")
    if "selection_split" in notes:
        lines.append(f"C chosen on the split {notes['selection_split']}")
    for fraction, of in notes.get("fractions", {}).items():
        unconverged = sum(of["unconverged"].values())
        stopped = f", {unconverged} fits stopped before they converged" if unconverged else ""
        samples = f"{of['samples']} images of {of['patients']} patients"
        lines.append(f"{fraction} of the labels: {samples}, {of['findings']} findings{stopped}")
    if "queries" in notes:
        without = (
            f", {notes['without_report']} samples without a report left out"
            if notes["without_report"]
            else ""
        )
        lines.append(f"{notes['queries']} queries, {notes['distinct_reports']} distinct reports{without}")
    if "pixels" in notes:
        lines.append(f"pixel baseline: {notes['pixels']}")
    reasons: dict[str, list[str]] = {}
    for item in notes.get("not_evaluable", []):
        reasons.setdefault(item["reason"], []).append(item["finding"])
    return lines + [f"no number for {', '.join(found)}: {reason}" for reason, found in reasons.items()]


def label(metric: str) -> str:
    """A metric for people: "image_to_text/P@5/macro" -> "image→text P@5 macro"."""
    words = []
    for part in metric.split("/"):
        name, at, fraction = part.partition("@")
        words.append(_NAMES.get(name, name) + (f" {fraction}" if at and "%" in fraction else at + fraction))
    return " ".join(words)


def _is_by_finding(of: Grid) -> bool:
    return all(metric.startswith("auroc/") and not _is_summary(metric) for metric in of.metrics)


def _is_summary(metric: str) -> bool:
    if metric.startswith("accuracy"):
        return False
    return metric.endswith("/macro") or "/R@" in metric or metric.endswith("/median_rank")
