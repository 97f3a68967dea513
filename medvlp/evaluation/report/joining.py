"""Puts the results of tasks and units that were evaluated apart together to one evaluation of the run."""

from collections.abc import Mapping
from pathlib import Path

from medvlp.evaluation.report.differences import different_keys
from medvlp.evaluation.report.results import KEPT, NETWORKS, PLACES, Evaluation, KeptFile
from medvlp.evaluation.task import EvaluationError, TaskResult, tasks

#: Settings by task, which tasks that are in one file only bring along.
_OF_TASKS = frozenset(("options", "files"))


def join(parts: Mapping[Path, Evaluation]) -> Evaluation:
    """One evaluation with the tasks of all.

    Args:
        parts: file -> its evaluation; all of one checkpoint, on the same data, with the same settings.

    Raises:
        EvaluationError: they are not, a task or unit is in two of them, or a unit is in none.
    """
    files = list(parts)
    first = parts[files[0]]
    joined = Evaluation(
        first.model, first.data | {"splits": {}}, first.settings | {"tasks": []}, config=first.config
    )
    for file, part in parts.items():
        _check_same(files[0], first, file, part)
        _check_same_options(joined, file, part)
        for task, models in part.results.items():
            # Every unit of a task that the method cannot do says so.
            if task in joined.results and (models or joined.results[task]):
                raise EvaluationError(f"{file}: {task} is in another file too; delete one of them")
            joined.results[task] = models
            for kind in KEPT:
                if task in getattr(part, kind):
                    getattr(joined, kind)[task] = getattr(part, kind)[task]
        for task, units in part.units.items():
            stored = joined.units.setdefault(task, {})
            if twice := sorted(stored.keys() & units.keys()):
                raise EvaluationError(
                    f"{file}: {task}, unit {twice[0]} is in another file too; delete one of them"
                )
            stored |= units
        joined.notes |= part.notes
        joined.settings["tasks"] += [
            task for task in part.settings["tasks"] if task not in joined.settings["tasks"]
        ]
        for of_tasks in _OF_TASKS & part.settings.keys():
            joined.settings[of_tasks] = joined.settings.get(of_tasks, {}) | part.settings[of_tasks]
        joined.data["splits"] |= part.data["splits"]
    return complete(joined)


def complete(evaluation: Evaluation) -> Evaluation:
    """The evaluation with the results of its tasks in place of those of their units.

    Raises:
        EvaluationError: a unit is missing, or no such task is registered here.
    """
    known, settings = tasks(), evaluation.settings
    for name, units in evaluation.units.items():
        if name not in known:
            raise EvaluationError(f"task {name} was evaluated by units, and no such task is registered here")
        try:
            task = known[name](known[name].config(**settings["options"][name]))
            expected = {unit: unit.name for unit in task.units()}
        except (KeyError, TypeError, ValueError) as error:
            raise EvaluationError(f"the settings of task {name} cannot be read ({error})") from error
        if missing := [unit for unit in expected.values() if unit not in units]:
            raise EvaluationError(
                f"{name}: without unit {', '.join(missing)}: evaluate it (medvlp evaluate ... --task {name} "
                f"--unit {missing[0]})"
            )
        parts = {unit: units[unit_name] for unit, unit_name in expected.items()}
        result = task.join({unit: TaskResult(of.models, of.notes) for unit, of in parts.items()})
        evaluation.results[name], evaluation.notes[name] = result.models, result.notes
        for kind in KEPT:
            kept = {unit.name: KeptFile(of.fingerprint, getattr(of, kind)) for unit, of in parts.items()}
            if kept := {unit: file for unit, file in kept.items() if file.checksum}:
                getattr(evaluation, kind)[name] = kept
    evaluation.units = {}
    return evaluation


def _check_same(first_file: Path, first: Evaluation, file: Path, part: Evaluation) -> None:
    for what, one, other in (
        ("checkpoint", first.model, part.model),
        ("data", _without(first.data, "splits"), _without(part.data, "splits")),
        (
            "settings",
            _without(first.settings, "tasks", *_OF_TASKS),
            _without(part.settings, "tasks", *_OF_TASKS),
        ),
    ):
        if one != other:
            raise EvaluationError(f"{file}: has another {what} than {first_file}; evaluate the task again")
    decisive = [key for key in different_keys(first, part) if _decides(*key.partition(".")[::2])]
    if decisive:
        raise EvaluationError(
            f"{file}: was evaluated with another {', '.join(decisive)} than {first_file}; evaluate the task "
            "again"
        )


def _decides(section: str, key: str) -> bool:
    """Whether a key of the run's config, which an evaluation may override, changes what is measured."""
    return (
        section in NETWORKS
        or (section == "data" and key not in PLACES)
        or (section, key) == ("train", "seed")
    )


def _check_same_options(joined: Evaluation, file: Path, part: Evaluation) -> None:
    """The units of a task are evaluated alike, whichever of the files they are in."""
    for of_tasks in sorted(_OF_TASKS):
        ours, theirs = joined.settings.get(of_tasks, {}), part.settings.get(of_tasks, {})
        for task in set(joined.settings["tasks"]) & set(part.settings["tasks"]):
            if ours.get(task, {}) != theirs.get(task, {}):
                what = "settings" if of_tasks == "options" else "contents of the files of the settings"
                raise EvaluationError(
                    f"{file}: has other {what} of {task} than a file before it; evaluate it again"
                )


def _without(values: Mapping[str, object], *names: str) -> dict[str, object]:
    return {key: value for key, value in values.items() if key not in names}
