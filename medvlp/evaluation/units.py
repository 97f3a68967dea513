"""Finished units on disk: `RUN/evaluation-units/<task>/<unit>-<fingerprint>/result.json`.

The fingerprint is of everything the numbers depend on. A unit whose fingerprint is the same is not done
again; one of another checkpoint, dataset or setting lies beside it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from importlib import metadata
from pathlib import Path

import xxhash

from medvlp.evaluation.report import examples, results, scores
from medvlp.evaluation.report.results import FOLDER, NETWORKS, PLACES, RESULT, Evaluation, UnitResult
from medvlp.evaluation.session import Session
from medvlp.evaluation.task import EvaluationError, Task, TaskResult, Unit
from medvlp.runs.identity import DataRecord


def fingerprint(session: Session, task: Task, unit: Unit) -> str:
    """Of checkpoint, data, settings and code version of a unit, as 32 hexadecimal digits.

    Raises:
        EvaluationError: a file that a setting names cannot be read.
    """
    config = asdict(session.config)
    evaluation = config["evaluation"]
    settings = {name: value for name, value in asdict(task.settings).items() if name not in task.unit_keys}
    decides = {
        "program": metadata.version("medvlp"),
        "task": [task.name, task.version, unit.name, settings, files_of(task)],
        "training": task.depends_on(session, unit),
        "weights": session.source.weights,
        "tokenizer": session.tokenizer.fingerprint,
        "dataset": DataRecord.of(session.reader.index, evaluation["split"]).content,
        "evaluation": {name: value for name, value in evaluation.items() if name != "tasks"},
        "findings": session.findings,
        "uncertain": session.uncertain,
        "device": session.device.type,
        "networks": [config[name] for name in NETWORKS],
        "seed": config["train"]["seed"],
        "data": {name: value for name, value in config["data"].items() if name not in PLACES},
    }
    return xxhash.xxh3_128_hexdigest(json.dumps(decides, sort_keys=True).encode())


def files_of(task: Task) -> dict[str, str]:
    """Checksums of the files that a task's settings name, by the name of the setting.

    Raises:
        EvaluationError: a file cannot be read.
    """
    found = {}
    for item in fields(task.settings):
        file = getattr(task.settings, item.name)
        if item.metadata.get("file") and file is not None:
            try:
                found[item.name] = xxhash.xxh3_128_hexdigest(Path(file).read_bytes())
            except OSError as error:
                raise EvaluationError(
                    f"evaluation.tasks.{task.name}.{item.name}={file}: cannot be read ({error.strerror})"
                ) from error
    return found


@dataclass(frozen=True)
class StoredUnit:
    """Where a unit's result lies, or will lie.

    Attributes:
        folder: of the result. fingerprint: of everything its numbers depend on.
        work: where the task keeps its state: that of the unit before anybody made files of its output
            (`Task.own_files`), which teach nothing and cannot be there before the training.
    """

    folder: Path
    fingerprint: str
    work: Path

    @classmethod
    def of(cls, session: Session, task: Task, unit: Unit) -> StoredUnit:
        """The place of a unit in the run folder; errors as `fingerprint`."""
        alone = type(task)(replace(task.settings, **dict.fromkeys(task.own_files)))
        digests = [fingerprint(session, of, unit) for of in (task, alone)]
        of_tasks = session.source.run / FOLDER / task.name
        folder, work = (of_tasks / f"{unit.name}-{digest[:16]}" for digest in digests)
        return cls(folder, digests[0], work)

    @property
    def file(self) -> Path:
        """The result; there is one when the unit is finished."""
        return self.folder / RESULT

    def read(self, task: Task, unit: Unit) -> Evaluation | None:
        """The file of the finished unit; None if there is none.

        Raises:
            EvaluationError: it is not of this unit.
        """
        if not self.file.is_file():
            return None
        stored = results.read(self.file)
        found = stored.units.get(task.name, {}).get(unit.name)
        if found is None or found.fingerprint != self.fingerprint:
            raise EvaluationError(
                f"{self.file} is not the result of {task.name}, unit {unit.name}: delete it"
            )
        return stored

    def keep(self, found: TaskResult) -> tuple[str, str]:
        """Write the scores and examples of a unit, before its result; their checksums, "" for none.

        Raises:
            DataError: they cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        return (
            "" if found.scores is None else scores.write(found.scores, self.folder),
            "" if found.examples is None else examples.write(found.examples, self.folder),
        )

    def write(self, evaluation: Evaluation, task: Task, unit: Unit, result: UnitResult) -> None:
        """Write the file of a finished unit; `evaluation` says what it is of.

        Raises:
            DataError: it cannot be written.
        """
        settings = evaluation.settings | {
            "tasks": [task.name],
            "options": {task.name: asdict(task.settings)},
            **{name: {task.name: evaluation.settings[name][task.name]} for name in ("files", "by")},
        }
        units = {task.name: {unit.name: result}}
        results.write(
            Evaluation(evaluation.model, evaluation.data, settings, units=units, config=evaluation.config),
            self.file,
        )
