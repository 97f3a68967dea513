"""Puts the results of tasks that were evaluated apart together to one evaluation of the run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from medvlp.evaluation.report.results import Evaluation, EvaluationError


def join(parts: Mapping[Path, Evaluation]) -> Evaluation:
    """One evaluation with the tasks of all.

    Args:
        parts: file -> its evaluation; all of one checkpoint, on the same data, with the same settings.

    Raises:
        EvaluationError: they are not, or a task is in two of them.
    """
    files = list(parts)
    first = parts[files[0]]
    joined = Evaluation(first.model, first.data, first.settings | {"tasks": []}, config=first.config)
    joined.data = first.data | {"splits": {}}
    for file, part in parts.items():
        _check_same(files[0], first, file, part)
        for task, models in part.results.items():
            if task in joined.results:
                raise EvaluationError(f"{file}: {task} is in another file too; delete one of them")
            joined.results[task] = models
        joined.notes |= part.notes
        joined.settings["tasks"] += part.settings["tasks"]
        joined.data["splits"] |= part.data["splits"]
    return joined


def _check_same(first_file: Path, first: Evaluation, file: Path, part: Evaluation) -> None:
    for what, one, other in (
        ("checkpoint", first.model, part.model),
        ("data", _without(first.data, "splits"), _without(part.data, "splits")),
        ("settings", _without(first.settings, "tasks"), _without(part.settings, "tasks")),
    ):
        if one != other:
            raise EvaluationError(f"{file}: has another {what} than {first_file}; evaluate the task again")


def _without(values: Mapping[str, object], name: str) -> dict[str, object]:
    return {key: value for key, value in values.items() if key != name}
