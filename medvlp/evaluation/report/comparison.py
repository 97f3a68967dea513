"""Several evaluations of the same data side by side: which row and which number stands where."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from medvlp.config import TransformConfig
from medvlp.data.transforms import evaluation_crop
from medvlp.evaluation.report.results import Evaluation
from medvlp.evaluation.task import EvaluationError, Metrics, Reading, tasks

#: Models that hardly depend on the run: shown once when several evaluations have the same numbers for them.
SHARED_MODELS = ("pixels", "prior", "finding-prior", "chance")


def reading_of(task: str) -> Reading:
    """How a task's numbers read; those of a task that is not registered here, under their stored names."""
    known = tasks().get(task)
    return known.reading if known else Reading()


def truth_of(evaluation: Evaluation) -> str:
    """What numbers are measured against: equal for evaluations that may stand in one table."""
    data, settings = evaluation.data, evaluation.settings
    labels = sorted(settings.get("labels", []))
    said = [data["fingerprint"], data["split"], settings["uncertain"], settings.get("blank"), labels]
    return json.dumps(said)


def truths(evaluation: Evaluation, task: str) -> Mapping[str, Any]:
    """What a task is measured against beside that, by name; nothing where the method cannot do it.

    Raises:
        EvaluationError: the config or the notes are not what this program writes.
    """
    if not evaluation.results.get(task):
        return {}
    try:
        return reading_of(task).truth(evaluation.config.get("data", {}), evaluation.notes[task])
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise EvaluationError(
            f"{task}: config and notes of its result are not as this program writes them: evaluate it again"
        ) from error


def other_truths(first: Evaluation, other: Evaluation, task: str) -> list[str]:
    """Names of what two evaluations measure a task against otherwise; none where one has no numbers."""
    one, two = truths(first, task), truths(other, task)
    return [name for name in one if name in two and one[name] != two[name]]


def check_alike(evaluations: Mapping[str, Evaluation]) -> None:
    """See to it that evaluations may stand in one table.

    Raises:
        EvaluationError: they are not of the same split of the same data.
    """
    first = next(iter(evaluations.values()))
    for name, evaluation in evaluations.items():
        if truth_of(evaluation) != truth_of(first):
            raise EvaluationError(
                f"{name}: another dataset, split, choice of labels or treatment of uncertain and unknown "
                "labels than the first evaluation; evaluate all of them alike"
            )


def by_task(evaluations: Mapping[str, Evaluation]) -> dict[str, list[dict[str, Evaluation]]]:
    """Every task that one of the evaluations has -> those that have it, table by table.

    Raises:
        EvaluationError: they are not of the same split of the same data.
    """
    check_alike(evaluations)
    found: dict[str, list[dict[str, Evaluation]]] = {}
    for name, evaluation in evaluations.items():
        for task in evaluation.results:
            groups = found.setdefault(task, [])
            alike = [group for group in groups if not _apart(group, evaluation, task)]
            if alike:
                alike[0][name] = evaluation
            else:
                groups.append({name: evaluation})
    return found


def _apart(group: Mapping[str, Evaluation], evaluation: Evaluation, task: str) -> list[str]:
    """Names of what an evaluation measures a task against otherwise than those of a table."""
    return list(dict.fromkeys(name for of in group.values() for name in other_truths(of, evaluation, task)))


def apart(first: Mapping[str, Evaluation], group: Mapping[str, Evaluation], task: str) -> list[str]:
    """Why the table of a group is not that of the first one; nothing for the first."""
    return [
        f"{task} of {name}: in a table of its own, for it was measured with other {', '.join(names)} than "
        + next(of for of in first if other_truths(first[of], evaluation, task))
        for name, evaluation in group.items()
        if (names := _apart(first, evaluation, task))
    ]


@dataclass
class Grid:
    """One task's numbers: `cells[model][metric]`, in the order to be shown; `reading` says how they read."""

    task: str
    metrics: list[str]
    cells: dict[str, Metrics]
    reading: Reading = Reading()

    def by_finding(self) -> Grid | None:
        """The one metric of a grid of single findings that has a short table; None if the task has none."""
        if self.reading.by_finding is None:
            return None
        chosen = [metric for metric in self.metrics if metric.startswith(f"{self.reading.by_finding}/")]
        return replace(self, metrics=chosen)


def grid(evaluations: Mapping[str, Evaluation], task: str, findings: bool = False) -> Grid:
    """Put one task of several evaluations side by side.

    Args:
        evaluations: evaluations by the name their models get in the table.
        task: name of one of their tasks.
        findings: rows for single findings (and accuracy, which rare findings make look high) instead of
            the summary.

    Raises:
        EvaluationError: an evaluation has no such task, or they may not stand in one table (see `by_task`).
    """
    tables = by_task(evaluations).get(task, [])
    if len(tables) > 1:
        raise EvaluationError("; ".join(apart(tables[0], tables[1], task)))
    cells: dict[str, Metrics] = {}
    models = {model for evaluation in evaluations.values() for model in evaluation.results.get(task, {})}
    for name, evaluation in evaluations.items():
        if name in models:  # "prior" is a baseline, and a likely name of a run
            name = f"{name} (run)"
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
    reading = reading_of(task)
    return Grid(task, [metric for metric in names if reading.summary(metric) != findings], ordered, reading)


def not_evaluated(name: str, task: str) -> str:
    """What is said of a run that lacks a task others have."""
    return f"{task} of {name}: not evaluated (medvlp evaluate ... --task {task})"


def unavailable(evaluations: Mapping[str, Evaluation], task: str) -> list[str]:
    """What cannot be said about single models: "TASK of NAME: not available: the method ..."."""
    reasons = {name: evaluation.notes[task].get("not_available") for name, evaluation in evaluations.items()}
    return [f"{task} of {name}: not available: {reason}" for name, reason in reasons.items() if reason]


def unlike(evaluations: Mapping[str, Evaluation], task: str) -> list[str]:
    """Where a task had other settings, or saw other parts of the images, than in the first evaluation, whose
    remarks are shown."""
    first, *others = evaluations
    lines = []
    for name in others:
        one, two = (options_of(evaluations[of], task) | _view(evaluations[of], task) for of in (first, name))
        if keys := sorted(key for key in one.keys() | two.keys() if one.get(key) != two.get(key)):
            lines.append(f"{task} of {name}: with another {', '.join(keys)} than {first}")
    return lines


def _view(evaluation: Evaluation, task: str) -> dict[str, object]:
    """What a network sees of an image, of a task that measures places in it."""
    data = evaluation.config.get("data")
    if not reading_of(task).places or not isinstance(data, dict):
        return {}
    said = data.get("transform")
    said = said if isinstance(said, dict) else {}
    view = TransformConfig(**{name: said[name] for name in ("crop", "evaluation") if name in said})
    return {"data.image_size": data.get("image_size"), "data.transform.evaluation": evaluation_crop(view)}


def options_of(evaluation: Evaluation, task: str) -> dict[str, object]:
    """The keys of a task; of those that name a file its content, and of the run's own files only whether."""
    options, files = (evaluation.settings.get(kind, {}).get(task, {}) for kind in ("options", "files"))
    own = tasks()[task].own_files if task in tasks() else frozenset()
    return {**options, **files, **{name: options.get(name) is not None for name in own}}
