"""The result of an evaluation and its file, `evaluation.json`.

schema_version  1
model           name, run, checkpoint (folder name), step, weights (checksum)
data            root, name, source (that built it), fingerprint, split; samples, patients and corrupt
                samples of each split used
settings        tasks, labels, uncertain, split, batch, bootstrap, seed, tokenizer fingerprint, and `options`:
                task -> its own keys (files of before have fractions and prompts in their place), `files`:
                task -> key that names a file -> the file's checksum (xxh3_128), `by`: task -> version of the
                program and of the task, and kind of device
results         task -> model -> metric -> {value, low, high}
                models: trained, untrained, pixels, chance; low and high bound the 95 % interval
                (bootstrap by patient) or are null
notes           task -> what stands beside its numbers: counts of each finding, findings that cannot be
                evaluated and why, chosen thresholds and penalties with the split that chose them;
                `by_unit`: unit -> those of the notes in which units of a task that trains differ;
                `not_available`: why the method cannot do the task at all (its results are then empty)
config          the resolved config of the run, with the overrides of the last evaluation that is in the file
scores          task -> unit -> {fingerprint, checksum} of the file of its scores (see `scores.py`)
resamples       the same of the file of its resamples (see `resamples.py`)
examples        the same of the file of its examples (see `examples.py`)
units           only in files of single units: task -> unit -> its models, notes and fingerprint
"""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from medvlp.evaluation.task import EvaluationError, Metrics
from shards.atomic import atomic_write
from shards.strict_json import JsonError, parse_json, read_limited, to_record

SCHEMA_VERSION = 1
#: Of finished units, in the run folder: `<task>/<unit>-<first 16 digits of its fingerprint>/`.
FOLDER = "evaluation-units"
#: In there, once the unit is finished.
RESULT = "result.json"
#: Sections of a run's config that make the networks.
NETWORKS = ("image", "text", "method", "prototypes")
#: Keys of its section `data` that change where and how fast it is read, not what.
PLACES = ("root", "tokenizer", "cache_dir", "cache_gigabytes", "workers", "prefetch", "allow_changed")
#: Settings by task, which tasks that are in one file only bring along.
OF_TASKS = ("options", "files", "by")
#: Files beside the result of a unit.
KEPT = ("scores", "resamples", "examples")
#: Largest `evaluation.json`, in bytes.
_LIMIT = 1 << 26


@dataclass
class KeptFile:
    """A file beside the result of a unit: the unit's fingerprint, and the file's checksum (xxh3_128)."""

    fingerprint: str
    checksum: str


@dataclass
class UnitResult:
    """One unit of a task.

    Attributes:
        models, notes: as of a `TaskResult`. fingerprint: of everything its numbers depend on.
        scores, resamples, examples: checksums of the files of its scores, resamples and examples; "" if
            there is none.
    """

    models: dict[str, Metrics] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    fingerprint: str = ""
    scores: str = ""
    resamples: str = ""
    examples: str = ""


@dataclass
class Evaluation:
    """Everything in `evaluation.json` (see the module)."""

    model: dict[str, Any]
    data: dict[str, Any]
    settings: dict[str, Any]
    results: dict[str, dict[str, Metrics]] = field(default_factory=dict)
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, dict[str, KeptFile]] = field(default_factory=dict)
    resamples: dict[str, dict[str, KeptFile]] = field(default_factory=dict)
    examples: dict[str, dict[str, KeptFile]] = field(default_factory=dict)
    units: dict[str, dict[str, UnitResult]] = field(default_factory=dict)


def write(evaluation: Evaluation, file: Path) -> None:
    """Write the JSON file in one move: a reader sees the old file or the new one, never half of one.

    Raises:
        DataError: it cannot be written.
    """
    content = _without_nan({"schema_version": SCHEMA_VERSION, **asdict(evaluation)})
    for section in (*KEPT, "units"):
        if not content[section]:
            del content[section]
    atomic_write(file, (json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode())


def read(file: Path) -> Evaluation:
    """Read an `evaluation.json`.

    Raises:
        EvaluationError: the file is missing, no JSON, or of another version.
    """
    try:
        content = parse_json(read_limited(file, _LIMIT), _LIMIT)
        version = content.pop("schema_version", None) if isinstance(content, dict) else None
        if version != SCHEMA_VERSION:
            shown = version if type(version) is int else "missing"
            raise EvaluationError(f"{file}: schema version {shown}, this program reads {SCHEMA_VERSION}")
        content |= {name: _with_nan(content.get(name, {})) for name in ("results", "units")}
        evaluation = to_record(content, Evaluation)
        _check_names(evaluation)
        return evaluation
    except OSError as error:
        raise EvaluationError(
            f"{file}: cannot be read ({error.strerror}); run `medvlp evaluate` first"
        ) from error
    except JsonError as error:
        raise EvaluationError(f"{file}: not an evaluation.json of this program ({error})") from error


def _check_names(evaluation: Evaluation) -> None:
    """Refuse a file without the texts and numbers that tables, pages and comparisons are made of."""
    for section, names in (
        ("model", ("name",)),
        ("data", ("name", "fingerprint", "split")),
        ("settings", ("uncertain",)),
    ):
        values = getattr(evaluation, section)
        for name in names:
            if not isinstance(values.get(name), str) or not values[name].isprintable():
                raise JsonError(f"{section}.{name} is no text")
    for name in ("checkpoint", "weights"):
        if not isinstance(evaluation.model.get(name, ""), str):
            raise JsonError(f"model.{name} is no text")
    step = evaluation.model.get("step")
    if type(step) is not int or not 0 <= step < 2**53:
        raise JsonError("model.step is no number of steps")
    splits = evaluation.data.setdefault("splits", {})
    if not isinstance(splits, dict) or not all(isinstance(of, dict) for of in splits.values()):
        raise JsonError("data.splits are no splits")
    for name in ("labels", "tasks"):
        texts = evaluation.settings.setdefault(name, [])
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise JsonError(f"settings.{name} are no texts")
    for name in OF_TASKS:
        of_tasks = evaluation.settings.get(name, {})
        if not isinstance(of_tasks, dict) or not all(isinstance(of, dict) for of in of_tasks.values()):
            raise JsonError(f"settings.{name} are not of tasks")
    if not evaluation.results.keys() <= evaluation.notes.keys():
        raise JsonError("a task has results and no notes")


def _with_nan(value: Any) -> Any:
    """The reverse of `_without_nan` for the values of estimates."""
    if not isinstance(value, dict):
        return value
    return {
        name: math.nan if name == "value" and item is None else _with_nan(item)
        for name, item in value.items()
    }


def _without_nan(value: Any) -> Any:
    """NaN (an undefined metric) as null: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
