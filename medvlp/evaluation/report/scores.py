"""The scores behind the numbers of a unit, `scores.safetensors` beside its result; curves are drawn of them.

Positions in the split, labels and scores; no text, no id of a patient or study. safetensors, because a
stranger's file is read without unpacking or running anything, and pandas and notebooks read it too.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from medvlp.evaluation.report.results import FOLDER, Evaluation
from medvlp.evaluation.task import EvaluationError, Scores
from shards.atomic import atomic_write
from shards.strict_json import PLAIN_NAME, JsonError, parse_json, read_limited, to_record

FILE = "scores.safetensors"
#: Largest file in bytes: 800,000 images, 14 findings and three models.
LIMIT = 1 << 28
_SAMPLE, _TRUTH, _MODEL, _ABOUT = "sample", "truth", "scores/", "medvlp"


@dataclass
class _About:
    """What the header of the file says of its arrays."""

    findings: list[str]
    thresholds: dict[str, dict[str, float]] = field(default_factory=dict)
    log_odds: list[str] = field(default_factory=list)
    exclusive: bool = False


def write(scores: Scores, folder: Path) -> str:
    """Write the file; its checksum, or "" where it would be larger than `LIMIT` and is not written.

    Raises:
        DataError: it cannot be written.
    """
    about = _About(
        list(scores.findings),
        {model: dict(of) for model, of in scores.thresholds.items()},
        sorted(scores.log_odds),
        scores.exclusive,
    )
    known = np.where(np.isnan(scores.truth), -1, scores.truth).astype(np.int8)
    arrays: dict[str, NDArray[Any]] = {_SAMPLE: np.asarray(scores.sample, dtype=np.int64), _TRUTH: known}
    # In float64: an image whose score is a threshold is called in the file as in the table.
    arrays |= {_MODEL + model: of.astype(np.float64) for model, of in scores.models.items()}
    # safetensors writes the bytes of an array as they lie: by column, if it is a choice of columns.
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    if sum(array.nbytes for array in arrays.values()) > LIMIT:
        return ""
    data = save(arrays, {_ABOUT: json.dumps(asdict(about), ensure_ascii=False)})
    atomic_write(folder / FILE, data)
    return xxhash.xxh3_128_hexdigest(data)


def read(run: Path, evaluation: Evaluation, task: str, unit: str) -> Scores:
    """The scores behind the numbers that an evaluation has of a unit.

    Raises:
        EvaluationError: they are not stored, or the file is another one or damaged.
    """
    kept = evaluation.scores.get(task, {}).get(unit)
    if kept is None or not all(map(PLAIN_NAME.fullmatch, (task, unit, kept.fingerprint))):
        raise EvaluationError(f"{task}, {unit}: no scores are stored (evaluate again with --fresh)")
    file = run / FOLDER / task / f"{unit}-{kept.fingerprint[:16]}" / FILE
    try:
        data = read_limited(file, LIMIT)
        if xxhash.xxh3_128_hexdigest(data) != kept.checksum:
            raise EvaluationError(f"{file}: not the scores of this evaluation; evaluate again with --fresh")
        return _parsed(data)
    except OSError as error:
        raise EvaluationError(f"{file}: cannot be read ({error.strerror})") from error
    except (JsonError, SafetensorError, KeyError, TypeError, ValueError) as error:
        reason = f" ({error})" if isinstance(error, JsonError) else ""
        raise EvaluationError(f"{file}: no scores of this program{reason}") from error


def _parsed(data: bytes) -> Scores:
    """The content of a file; where it is no such file, an error of the kinds that `read` takes for that."""
    arrays = load(data)
    size = int.from_bytes(data[:8], "little")
    header = parse_json(data[8 : 8 + size], LIMIT)
    about = to_record(parse_json(header["__metadata__"][_ABOUT], LIMIT), _About)
    sample, truth = arrays.pop(_SAMPLE), arrays.pop(_TRUTH).astype(np.float64)
    shape = len(sample), len(about.findings)
    models = {name.removeprefix(_MODEL): of.astype(np.float64) for name, of in arrays.items()}
    if any(of.shape != shape or not np.isfinite(of).all() for of in (truth, *models.values())):
        raise JsonError("arrays that do not belong together")
    if not set(np.unique(truth)) <= {-1, 0, 1}:
        raise JsonError("labels that are none")
    truth[truth < 0] = np.nan
    return Scores(
        sample, about.findings, truth, models, about.thresholds, frozenset(about.log_odds), about.exclusive
    )
