"""The examples of a unit, `examples.json` beside its result; pictures for people are drawn of them.

Positions in the split, masks, boxes and, of a task that writes reports, text. No image is in it and no id of
a patient or study; like all text it stays in the run folder.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from medvlp.evaluation.examples import Box, BoxExample, Examples, MaskExample, TextExample
from medvlp.evaluation.report.results import FOLDER, Evaluation
from medvlp.evaluation.task import EvaluationError
from shards.atomic import atomic_write
from shards.errors import DataError
from shards.masks import decode_runs
from shards.strict_json import PLAIN_NAME, JsonError, parse_json, read_limited, to_record

FILE = "examples.json"
#: Largest file in bytes: 16 masks of 1024 x 1024 pixels, all of them frayed.
LIMIT = 1 << 22
#: Largest side of an image whose places are drawn, most characters of a text, and most boxes of a list.
_SIDE, _TEXT, _BOXES = 4096, 20_000, 100


def write(examples: Examples, folder: Path) -> str:
    """Write the file; its checksum, or "" where it would be larger than `LIMIT` and is not written.

    Raises:
        DataError: it cannot be written.
    """
    data = json.dumps(asdict(examples), ensure_ascii=False, allow_nan=False).encode()
    if len(data) > LIMIT:
        return ""
    atomic_write(folder / FILE, data)
    return xxhash.xxh3_128_hexdigest(data)


def read(run: Path, evaluation: Evaluation, task: str, unit: str) -> Examples:
    """The examples of a unit that an evaluation has numbers of.

    Raises:
        EvaluationError: none are stored, or the file is another one or damaged.
    """
    kept = evaluation.examples.get(task, {}).get(unit)
    if kept is None or not all(map(PLAIN_NAME.fullmatch, (task, unit, kept.fingerprint))):
        raise EvaluationError(
            f"{task}, {unit}: no examples are stored: it was evaluated by a version that kept none (evaluate "
            "again with --fresh; finished trainings are kept)"
        )
    file = run / FOLDER / task / f"{unit}-{kept.fingerprint[:16]}" / FILE
    try:
        data = read_limited(file, LIMIT)
        if xxhash.xxh3_128_hexdigest(data) != kept.checksum:
            raise EvaluationError(f"{file}: not the examples of this evaluation; evaluate again with --fresh")
        found = to_record(parse_json(data, LIMIT), Examples)
        _check(found)
        return found
    except OSError as error:
        raise EvaluationError(f"{file}: cannot be read ({error.strerror})") from error
    except JsonError as error:
        raise EvaluationError(f"{file}: no examples of this program ({error})") from error


def mask_of(runs: str, side: int) -> NDArray[np.bool_]:
    """[side, side] the mask of `MaskExample`.

    Raises:
        DataError: no such run lengths.
    """
    if not runs:
        return np.zeros((side, side), dtype=bool)
    return decode_runs(runs, side, side, "absolute").astype(bool)


def _check(examples: Examples) -> None:
    """Raise JsonError for what cannot be drawn, or would take much memory."""
    places = bool(examples.masks or examples.boxes)
    if examples.crop not in ("none", "center") or not (1 if places else 0) <= examples.side <= _SIDE:
        raise JsonError("no view that a network has of an image")
    kinds: tuple[Sequence[MaskExample | BoxExample | TextExample], ...]
    kinds = (examples.masks, examples.boxes, examples.texts)
    if any(example.sample < 0 for kind in kinds for example in kind):
        raise JsonError("a sample that is none")
    for mask in examples.masks:
        try:
            mask_of(mask.predicted, examples.side), mask_of(mask.truth, examples.side)
        except DataError as error:
            raise JsonError(str(error)) from error
    for boxes in examples.boxes:
        for of in (boxes.found, boxes.truth):
            if len(of) > _BOXES or not all(_is_inside(box, examples.side) for box in of):
                raise JsonError("boxes that are none")
    if any(len(text) > _TEXT for of in examples.texts for text in (of.generated, of.reference)):
        raise JsonError("a text that is too long")


def _is_inside(box: Box, side: int) -> bool:
    return all(0 <= place <= side for place in (box.left, box.top, box.right, box.bottom))
