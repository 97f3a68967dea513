"""Puts the results of tasks and units that were evaluated apart together to one evaluation of the run."""

from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock

from medvlp.evaluation.report import results
from medvlp.evaluation.report.differences import different_keys
from medvlp.evaluation.report.results import KEPT, NETWORKS, OF_TASKS, PLACES, Evaluation, KeptFile
from medvlp.evaluation.task import EvaluationError, Task, TaskResult, tasks
from shards.errors import DataError

#: How long an evaluation waits for another one's merge of milliseconds. On a disk without locks of the system
#: that of a killed evaluation can stay.
_MERGE_SECONDS = 300
#: Of settings by task, what errors say where they differ.
_OTHER = {
    "options": "other settings",
    "files": "other contents of the files of the settings",
    "by": "another version or device",
}


def made_by(task: type[Task]) -> dict[str, Any]:
    """Which code gives a task its numbers."""
    return {"program": metadata.version("medvlp"), "version": task.version}


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
            _add_results(joined, part, task)
        for task, units in part.units.items():
            stored = joined.units.setdefault(task, {})
            if twice := sorted(stored.keys() & units.keys()):
                raise EvaluationError(
                    f"{file}: {task}, unit {twice[0]} is in another file too; delete one of them"
                )
            stored |= units
        joined.notes = part.notes | joined.notes  # a task that was left out may have been done elsewhere
        for task in part.settings["tasks"]:
            _add_settings(joined, part, task)
        joined.data["splits"] |= part.data["splits"]
    return complete(joined)


def with_earlier(evaluation: Evaluation, file: Path, say: Callable[[str], None]) -> Evaluation:
    """The evaluation with the tasks that an earlier one of the run has and it has not.

    Args:
        evaluation: with results of whole tasks.
        file: of the earlier one; need not be there.
        say: receives a line about what is kept, and one about each task that is left out because its numbers
            would be others now.
    """
    if not file.exists():
        return evaluation
    try:
        earlier = results.read(file)
    except EvaluationError as error:
        say(f"{error}: it is replaced")
        return evaluation
    reasons = {
        task: _unlike(evaluation, earlier, [task]) or _other_code(earlier, task)
        for task in earlier.results
        if task not in evaluation.results
    }
    for task, reason in reasons.items():
        if reason is not None:
            say(
                f"{file}: {task}, evaluated before with {reason}, is left out; evaluate it again (medvlp "
                f"evaluate ... --task {task})"
            )
    kept = [task for task, reason in reasons.items() if reason is None]
    if not kept:
        return evaluation
    say(f"{file}: also holds {', '.join(kept)}, evaluated before")
    whole = Evaluation(
        evaluation.model,
        evaluation.data | {"splits": earlier.data["splits"] | evaluation.data["splits"]},
        evaluation.settings | {"tasks": []},
        notes=dict(evaluation.notes),
        config=evaluation.config,
    )
    for part, names in ((earlier, kept), (evaluation, evaluation.results)):
        for task in names:
            _add_results(whole, part, task)
    for part, names in ((earlier, kept), (evaluation, evaluation.settings["tasks"])):
        for task in names:
            _add_settings(whole, part, task)
    return whole


def store(evaluation: Evaluation, file: Path, say: Callable[[str], None]) -> Evaluation:
    """Write an evaluation and what `with_earlier` keeps of the file; what was written.

    Evaluations of one run that end at the same time wait for each other, so that no task is lost.

    Raises:
        DataError: it cannot be written, or another evaluation holds it for minutes.
    """
    try:  # with a mode by which the next evaluation may be another user's
        with FileLock(file.with_name(f".{file.name}.lock"), _MERGE_SECONDS, mode=0o666):
            whole = with_earlier(evaluation, file, say)
            results.write(whole, file)
            return whole
    except OSError as error:
        why = error.strerror or error  # a lock that is not to be had says so in its text
        raise DataError(f"cannot write {file}: {why}; mend that, then run it again") from error


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


def _add_results(evaluation: Evaluation, part: Evaluation, task: str) -> None:
    evaluation.results[task], evaluation.notes[task] = part.results[task], part.notes[task]
    for kind in KEPT:
        if task in getattr(part, kind):
            getattr(evaluation, kind)[task] = getattr(part, kind)[task]


def _add_settings(evaluation: Evaluation, part: Evaluation, task: str) -> None:
    """What a file says of one of its tasks; that of a task which is there already stays."""
    if task in evaluation.settings["tasks"]:
        return
    evaluation.settings["tasks"].append(task)
    for name in OF_TASKS:
        if task in part.settings.get(name, {}):
            of_tasks = evaluation.settings.get(name, {})
            evaluation.settings[name] = of_tasks | {task: part.settings[name][task]}


def _check_same(first_file: Path, first: Evaluation, file: Path, part: Evaluation) -> None:
    if reason := _unlike(first, part, part.results.keys() | part.units.keys()):
        raise EvaluationError(f"{file}: has {reason} than {first_file}; evaluate the task again")


def _unlike(first: Evaluation, other: Evaluation, of: Iterable[str]) -> str | None:
    """What two evaluations differ in, where numbers of these tasks depend on it; places may differ."""
    if _different(first.model, other.model, "name", "run"):
        return "another checkpoint"
    for what, besides in (("data", ("root", "splits")), ("settings", ("tasks", *OF_TASKS))):
        if keys := _different(getattr(first, what), getattr(other, what), *besides):
            return f"other {what} ({', '.join(keys)})"
    known = tasks()
    trains = any(known[task].trains for task in of if task in known)
    decisive = [key for key in different_keys(first, other) if _decides(*key.partition(".")[::2], trains)]
    return f"another {', '.join(decisive)}" if decisive else None


def _other_code(earlier: Evaluation, task: str) -> str | None:
    """Whether another version of this program has evaluated a task (that is registered here)."""
    by, known = earlier.settings.get("by", {}).get(task, {}), tasks()
    now = made_by(known[task]) if task in known else {}
    return "another version of this program" if _different(by | now, by) else None


def _different(one: Mapping[str, Any], other: Mapping[str, Any], *besides: str) -> list[str]:
    keys = sorted((one.keys() | other.keys()) - set(besides))
    return [key for key in keys if one.get(key) != other.get(key)]


def _decides(section: str, key: str, trains: bool) -> bool:
    """Whether a key of the run's config, which an evaluation may override, changes what is measured."""
    return (
        section in NETWORKS
        or (section == "data" and key not in PLACES)
        or (section, key) == ("train", "seed")
        or (section in ("precision", "deepspeed") and trains)
    )


def _check_same_options(joined: Evaluation, file: Path, part: Evaluation) -> None:
    """The units of a task are evaluated alike, whichever of the files they are in."""
    for name, other in _OTHER.items():
        ours, theirs = joined.settings.get(name, {}), part.settings.get(name, {})
        for task in set(joined.settings["tasks"]) & set(part.settings["tasks"]):
            if ours.get(task, {}) != theirs.get(task, {}):
                raise EvaluationError(
                    f"{file}: has {other} of {task} than a file before it; evaluate it again"
                )
