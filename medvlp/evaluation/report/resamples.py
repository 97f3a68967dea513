"""What the metrics of a unit are in each resample of the patients, `resamples.safetensors` beside its result.

Of two evaluations with the same resamples the differences have intervals of their own, whatever the metric.
Numbers only: which patients were drawn is not in the file. safetensors, because a stranger's file is read
without unpacking or running anything.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from medvlp.evaluation.metrics.bootstrap import Estimate, Resampled
from medvlp.evaluation.report.results import FOLDER, Evaluation
from medvlp.evaluation.task import EvaluationError, Metrics
from shards.atomic import atomic_write
from shards.strict_json import PLAIN_NAME, JsonError, parse_json, read_limited, to_record

FILE = "resamples.safetensors"
#: Largest file in bytes: 20,000 metrics of three models, 1,000 resamples.
LIMIT = 1 << 28
_ABOUT = "medvlp"


@dataclass
class _About:
    """What the header says: fingerprints of the resamples, and the metrics [M] of each model."""

    resamples: list[str]
    metrics: dict[str, list[str]]


@dataclass(frozen=True)
class Resamples:
    """Metrics of the models of a unit, or of a task, in the resamples.

    Attributes:
        fingerprints: of the resamples (`PatientBootstrap.fingerprint`); equal ones are the same patients.
        drawn: model -> metric -> [R] values, NaN where undefined.
    """

    fingerprints: tuple[str, ...]
    drawn: Mapping[str, Mapping[str, NDArray[np.float64]]]


def taken_from(models: Mapping[str, Metrics], fingerprints: set[str]) -> tuple[dict[str, Metrics], Resamples]:
    """The models with plain estimates, as evaluation.json has them, and what these were in the resamples."""
    plain = {
        model: {metric: Estimate(of.value, of.low, of.high) for metric, of in metrics.items()}
        for model, metrics in models.items()
    }
    drawn = {
        model: {metric: of.draws for metric, of in metrics.items() if isinstance(of, Resampled)}
        for model, metrics in models.items()
    }
    return plain, Resamples(tuple(sorted(fingerprints)), {model: of for model, of in drawn.items() if of})


def write(resamples: Resamples, folder: Path) -> str:
    """Write the file; its checksum, or "" where there is nothing to write or it would be over `LIMIT`.

    Raises:
        DataError: it cannot be written.
    """
    arrays = {model: np.stack(list(of.values())).astype(np.float32) for model, of in resamples.drawn.items()}
    if not arrays or sum(array.nbytes for array in arrays.values()) > LIMIT:
        return ""
    about = _About(list(resamples.fingerprints), {model: list(of) for model, of in resamples.drawn.items()})
    folder.mkdir(parents=True, exist_ok=True)
    data = save(arrays, {_ABOUT: json.dumps(asdict(about), ensure_ascii=False)})
    atomic_write(folder / FILE, data)
    return xxhash.xxh3_128_hexdigest(data)


def read(run: Path, evaluation: Evaluation, task: str) -> Resamples:
    """The metrics of a task in the resamples; of a metric of several units (seeds) the mean.

    Args:
        run: folder of the run that the evaluation is of.
        evaluation: where the task was evaluated whole.
        task: its name.

    Raises:
        EvaluationError: they are not stored, or a file is another one or damaged.
    """
    kept = evaluation.resamples.get(task, {})
    if not kept:
        raise EvaluationError(f"{run}: {task} has no stored resamples (evaluate it again with --fresh)")
    found: dict[str, dict[str, list[NDArray[np.float64]]]] = {}
    fingerprints: list[str] = []
    for unit, of in kept.items():
        if not all(map(PLAIN_NAME.fullmatch, (task, unit, of.fingerprint))):
            raise EvaluationError(f"{run}: {task} has a unit that is none")
        part = _read(run / FOLDER / task / f"{unit}-{of.fingerprint[:16]}" / FILE, of.checksum)
        fingerprints += part.fingerprints
        for model, metrics in part.drawn.items():
            for metric, drawn in metrics.items():
                found.setdefault(model, {}).setdefault(metric, []).append(drawn)
    try:
        mean = {
            model: {metric: np.mean(drawn, axis=0) for metric, drawn in of.items()}
            for model, of in found.items()
        }
    except ValueError as error:
        raise EvaluationError(f"{run}: units of {task} have different numbers of resamples") from error
    return Resamples(tuple(fingerprints), mean)


def _read(file: Path, checksum: str) -> Resamples:
    try:
        data = read_limited(file, LIMIT)
        if xxhash.xxh3_128_hexdigest(data) != checksum:
            raise EvaluationError(
                f"{file}: not the resamples of this evaluation; evaluate again with --fresh"
            )
        return _parsed(data)
    except OSError as error:
        raise EvaluationError(
            f"{file}: cannot be read ({error.strerror}); evaluate again with --fresh"
        ) from error
    except (JsonError, SafetensorError, KeyError, TypeError, ValueError) as error:
        reason = f" ({error})" if isinstance(error, JsonError) else ""
        raise EvaluationError(f"{file}: no resamples of this program{reason}") from error


def _parsed(data: bytes) -> Resamples:
    """The content of a file; where it is no such file, an error of the kinds that `_read` takes for that."""
    arrays: dict[str, NDArray[Any]] = load(data)
    size = int.from_bytes(data[:8], "little")
    header = parse_json(data[8 : 8 + size], LIMIT)
    about = to_record(parse_json(header["__metadata__"][_ABOUT], LIMIT), _About)
    if about.metrics.keys() != arrays.keys():
        raise JsonError("models and arrays that do not belong together")
    for model, metrics in about.metrics.items():
        shape = arrays[model].shape
        if len(shape) != 2 or shape[0] != len(metrics) or len(set(metrics)) != len(metrics):
            raise JsonError("metrics and arrays that do not belong together")
    drawn = {
        model: dict(zip(metrics, arrays[model].astype(np.float64), strict=True))
        for model, metrics in about.metrics.items()
    }
    return Resamples(tuple(about.resamples), drawn)
