"""The result of an evaluation and its file, `evaluation.json`.

schema_version  1
model           name, run, checkpoint (folder name), step, weights (checksum)
data            root, name, fingerprint, split; samples, patients and corrupt samples of each split used
settings        tasks, labels, uncertain, split, batch, bootstrap, seed, tokenizer fingerprint, and `options`:
                task -> its own keys (files of before have fractions and prompts in their place)
results         task -> model -> metric -> {value, low, high}
                models: trained, untrained, pixels, chance; low and high bound the 95 % interval
                (bootstrap by patient) or are null
notes           task -> what stands beside its numbers: counts of each finding, findings that cannot be
                evaluated and why, chosen thresholds and penalties with the split that chose them;
                `not_available`: why the method cannot do the task at all (its results are then empty)
config          the resolved config of the run, with the overrides of this evaluation
units           only in files of single units: task -> unit -> its models, notes and fingerprint
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from medvlp.evaluation.metrics.bootstrap import Estimate
from medvlp.evaluation.task import EvaluationError, Metrics, TaskResult
from shards.atomic import atomic_write

SCHEMA_VERSION = 1


@dataclass
class UnitResult(TaskResult):
    """One unit of a task; `fingerprint` is of everything its numbers depend on."""

    fingerprint: str = ""


@dataclass
class Evaluation:
    """Everything in `evaluation.json` (see the module)."""

    model: dict[str, Any]
    data: dict[str, Any]
    settings: dict[str, Any]
    results: dict[str, dict[str, Metrics]] = field(default_factory=dict)
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    units: dict[str, dict[str, UnitResult]] = field(default_factory=dict)


def write(evaluation: Evaluation, file: Path) -> None:
    """Write the JSON file in one move: a reader sees the old file or the new one, never half of one.

    Raises:
        DataError: it cannot be written.
    """
    content = _without_nan({"schema_version": SCHEMA_VERSION, **asdict(evaluation)})
    if not evaluation.units:
        del content["units"]
    atomic_write(file, (json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode())


def read(file: Path) -> Evaluation:
    """Read an `evaluation.json`.

    Raises:
        EvaluationError: the file is missing, no JSON, or of another version.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        version = content.pop("schema_version")
        if version != SCHEMA_VERSION:
            raise EvaluationError(f"{file}: schema version {version}, this program reads {SCHEMA_VERSION}")
        content["results"] = {task: _models(models) for task, models in content["results"].items()}
        content["units"] = {
            task: {
                unit: UnitResult(**(values | {"models": _models(values["models"])}))
                for unit, values in units.items()
            }
            for task, units in content.get("units", {}).items()
        }
        return Evaluation(**content)
    except OSError as error:
        raise EvaluationError(
            f"{file}: cannot be read ({error.strerror}); run `medvlp evaluate` first"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EvaluationError(f"{file}: not an evaluation.json of this program ({error})") from error


def _models(stored: dict[str, dict[str, dict[str, float]]]) -> dict[str, Metrics]:
    return {
        model: {metric: Estimate(**estimate) for metric, estimate in metrics.items()}
        for model, metrics in stored.items()
    }


def _without_nan(value: Any) -> Any:
    """NaN (an undefined metric) as null: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
