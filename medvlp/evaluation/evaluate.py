"""One evaluation from beginning to end: load, see what is finished, do the units that are not, join them."""

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from medvlp import trust
from medvlp.config import Config
from medvlp.data.cache import open_reader
from medvlp.device import device_named
from medvlp.evaluation.features import exact_kernels
from medvlp.evaluation.labels import Uncertain
from medvlp.evaluation.report import resamples
from medvlp.evaluation.report.joining import complete, made_by
from medvlp.evaluation.report.results import Evaluation, UnitResult
from medvlp.evaluation.report.tracking import track
from medvlp.evaluation.session import Session
from medvlp.evaluation.supervised import train_here
from medvlp.evaluation.task import EvaluationError, Task, Unit, check_used, schemas, tasks
from medvlp.evaluation.trained import TrainedTask, with_labels_of
from medvlp.evaluation.units import StoredUnit, files_of
from medvlp.runs import saved_run
from shards.errors import MedvlpError, NotFiniteError, UsageError


@dataclass(frozen=True)
class EvaluationOptions:
    """What the user asks for.

    Attributes:
        source: run folder or checkpoint folder.
        data: dataset folder or URL prefix; None: the one the run was trained on.
        tasks: names of tasks; none: every task the dataset allows.
        units: names of units of the one task named; none: all. The result is then a part, to be joined.
        labels: labels to evaluate; none: all of the dataset.
        files: YAML files over the run's config.
        overrides: `section.key=value` over both.
        uncertain: what becomes of uncertain labels.
        device: "auto", "cpu" or "cuda".
        fresh: do finished units again.
        train: trains the run that a config describes and gives its exit code; default: in this process.
        keep: stores an evaluation of whole tasks, and gives all that is stored, earlier tasks too: what the
            W&B run is told. Default: it is not stored.
    """

    source: Path
    data: str | None = None
    tasks: Sequence[str] = ()
    units: Sequence[str] = ()
    labels: Sequence[str] = ()
    files: Sequence[Path] = ()
    overrides: Sequence[str] = ()
    uncertain: Uncertain = "exclude"
    device: str = "auto"
    fresh: bool = False
    train: Callable[[Config], int] = train_here
    keep: Callable[[Evaluation], Evaluation] = lambda evaluation: evaluation

    def check(self) -> None:
        """Raise UsageError for a value that does not exist, LaunchError where GPUs of a job are gone."""
        choices: dict[str, tuple[Sequence[str], Sequence[str]]] = {
            "--task": (self.tasks, list(tasks())),
            "--uncertain": ((self.uncertain,), get_args(Uncertain)),
        }
        for option, (values, known) in choices.items():
            for value in values:
                if value not in known:
                    raise UsageError(f"{option} {value}: there are {', '.join(known)}")
        device_named(self.device)
        if self.units and len(self.tasks) != 1:
            raise UsageError("--unit is of one task: name it with --task")


def units_of(task: Task, chosen: Sequence[str]) -> list[Unit]:
    """The chosen units of a task (all for none chosen).

    Raises:
        UsageError: it has no such unit.
    """
    units = {unit.name: unit for unit in task.units()}
    for name in chosen:
        if name not in units:
            raise UsageError(f"--unit {name}: {task.name} has {', '.join(units)}")
    return [units[name] for name in chosen or units]


def quick_tasks() -> list[str]:
    """Names of the tasks that are done where none is named: those that train no network."""
    return [name for name, task in tasks().items() if not task.trains]


def evaluate(options: EvaluationOptions, say: Callable[[str], None]) -> Evaluation:
    """Evaluate a run beside its baselines.

    Args:
        options: what to evaluate on what.
        say: receives one line of progress at a time.

    Raises:
        MedvlpError: something needed is missing or wrong (see `saved_run`, `splits` and the tasks).
    """
    options.check()
    check_used(options.files, options.overrides, options.tasks)
    session = _open(options, say)
    wanted = options.tasks or quick_tasks()
    chosen = [_task(name, options, session.config, say) for name in wanted]
    evaluation = _empty(options, session, chosen)
    jobs: list[tuple[Task, dict[Unit, StoredUnit]]] = []
    for task in chosen:
        if reason := task.unavailable_on(session.facts(task)):
            _leave_out(evaluation, task, EvaluationError(f"{task.name}: {reason}"), options, say)
            continue
        todo = _unfinished(task, evaluation, options, session)
        if todo and (reason := task.unavailable_with(session.models["trained"])):
            reason = f"the method {session.config.method.name} {reason}"
            evaluation.results[task.name], evaluation.notes[task.name] = {}, {"not_available": reason}
            evaluation.units.pop(task.name, None)
            continue
        try:
            if todo:
                _check_writable(task, session)
                session.check(task)
        except EvaluationError as error:
            _leave_out(evaluation, task, error, options, say)
            continue
        if todo:
            session.expect(task)
            jobs.append((task, todo))
    for task, todo in jobs:
        say(f"{task.name}: started")
        start = time.monotonic()
        try:
            for unit, stored in todo.items():
                _run(task, unit, stored, evaluation, session)
        except (EvaluationError, NotFiniteError) as error:
            _leave_out(evaluation, task, error, options, say)
            continue
        say(f"{task.name}: done in {time.monotonic() - start:.0f} s")
    if not options.units:
        complete(evaluation)
    if not evaluation.results and not evaluation.units:
        raise EvaluationError(
            f"{session.config.data.root}: no task can be evaluated on it (see the lines above)"
        )
    names = [task.name for task in chosen]
    evaluation.results = {name: evaluation.results[name] for name in names if name in evaluation.results}
    if not options.units:
        session.config.monitor.share_samples = _shares(options, session)
        track(options.keep(evaluation), session.source, session.config, session.reader)
    return evaluation


def _task(name: str, options: EvaluationOptions, config: Config, say: Callable[[str], None]) -> Task:
    """A task with its settings; of one that trains, what the evaluation says of labels is put into them."""
    task, settings = tasks()[name], config.evaluation.tasks[name]
    if issubclass(task, TrainedTask):
        settings = with_labels_of(name, settings, options.labels, options.uncertain, config.evaluation.blank)
        config.evaluation.tasks[name] = settings
    elif task.hedged and options.uncertain != "exclude":
        say(f"{name}: {task.hedged}, whatever --uncertain says")
    return task(settings)


def _shares(options: EvaluationOptions, session: Session) -> bool:
    """Whether the user has said, now or when the run was started, that images and reports may leave it."""
    if not session.config.monitor.share_samples:
        return False
    key = "monitor.share_samples"
    if trust.is_said(key, True) or any(word.startswith(f"{key}=") for word in options.overrides):
        return True
    session.say(f"no images in W&B: {key} is the run folder's word alone; say {key}=true to share them")
    return False


def _open(options: EvaluationOptions, say: Callable[[str], None]) -> Session:
    source = saved_run.locate(options.source)
    # A run that stores no tokenizer reads it where its own data are.
    moved = None if source.stored is None else options.data
    trains = any(tasks()[name].trains for name in options.tasks)
    config = saved_run.load_config(
        source, options.overrides, moved, untrained=True, tasks=schemas(), files=options.files, trains=trains
    )
    tokenizer = saved_run.load_tokenizer(source, config)
    if options.data is not None:
        config.data.root = options.data
    said = options.data is not None or any(text.startswith("data.root=") for text in options.overrides)
    saved_run.check_place(source, config, said)
    reader = open_reader(config.data)
    saved_run.check_data(source, config, reader.index, said, say)
    device = device_named(options.device)
    return Session(
        source, config, tokenizer, device, reader, options.labels, options.uncertain, say, options.train
    )


def _empty(options: EvaluationOptions, session: Session, chosen: Sequence[Task]) -> Evaluation:
    """The evaluation without results: what of, on what, how."""
    config, source, index = session.config, session.source, session.reader.index
    common = dataclasses.asdict(config.evaluation)
    wanted = [task.name for task in chosen]
    return Evaluation(
        model={
            "name": source.name(config),
            "run": str(source.run),
            "checkpoint": source.checkpoint.name,
            "step": source.step,
            "weights": source.weights,
        },
        data={
            "root": str(config.data.root),
            "name": index.name,
            "source": index.arguments.get("source", {}).get("name"),
            "fingerprint": index.fingerprint,
            "split": config.evaluation.split,
            "splits": {},
        },
        settings={
            "tasks": wanted,
            "labels": list(options.labels),
            "uncertain": options.uncertain,
            "tokenizer": session.tokenizer.fingerprint,
            "options": {name: values for name, values in common.pop("tasks").items() if name in wanted},
            "files": {task.name: files_of(task) for task in chosen},
            "by": {task.name: {**made_by(type(task)), "device": session.device.type} for task in chosen},
            **common,
        },
        config=dataclasses.asdict(config),
    )


def _unfinished(
    task: Task, evaluation: Evaluation, options: EvaluationOptions, session: Session
) -> dict[Unit, StoredUnit]:
    """The units still to be done; the results of the finished ones are put into the evaluation."""
    todo = {}
    for unit in units_of(task, options.units):
        stored = StoredUnit.of(session, task, unit)
        found = None if options.fresh else stored.read(task, unit)
        if found is None:
            todo[unit] = stored
            continue
        session.say(f"{task.name}, {unit.name}: is finished ({stored.file}); --fresh evaluates it again")
        evaluation.units.setdefault(task.name, {})[unit.name] = found.units[task.name][unit.name]
        evaluation.data["splits"] |= found.data["splits"]
    return todo


def _check_writable(task: Task, session: Session) -> None:
    if task.trains and not os.access(session.source.run, os.W_OK):
        raise EvaluationError(
            f"{task.name}: it trains networks inside {session.source.run}, which cannot be written: evaluate "
            "a copy of the run folder"
        )


def _run(task: Task, unit: Unit, stored: StoredUnit, evaluation: Evaluation, session: Session) -> None:
    """Do one unit and keep its result, in the evaluation and in the run folder."""
    can_write = os.access(session.source.run, os.W_OK)
    folder = stored.work if can_write else None
    with exact_kernels():
        fitted = task.fit(session.view(task, ("train", "selection"), folder), unit)
        view = session.view(task, ("evaluated",), folder)
        found = task.measure(view, unit, fitted)
    models, drawn = resamples.taken_from(found.models, view.resamples)
    result = UnitResult(models, found.notes, stored.fingerprint)
    if can_write:
        result.scores, result.examples = stored.keep(found)
        result.resamples = resamples.write(drawn, stored.folder)
    evaluation.units.setdefault(task.name, {})[unit.name] = result
    evaluation.data["splits"] |= session.splits_used()
    if can_write:
        stored.write(evaluation, task, unit, result)
    else:
        session.say(
            f"{task.name}, {unit.name}: {session.source.run} cannot be written, so it is not kept there"
        )


def _leave_out(
    evaluation: Evaluation,
    task: Task,
    error: MedvlpError,
    options: EvaluationOptions,
    say: Callable[[str], None],
) -> None:
    """Note why a task has no result; a task that was asked for by name must have one."""
    if options.tasks:
        raise error
    say(f"{task.name} left out: {error}")
    evaluation.units.pop(task.name, None)
    evaluation.notes[task.name] = {"left_out": str(error)}
