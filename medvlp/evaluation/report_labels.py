"""Which findings reports state, as a table of a dataset's labels: by the project's rules, or from a file."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from medvlp.evaluation.metrics.clinical import LabelTable, no_finding, plain
from medvlp.evaluation.task import EvaluationError
from shards.entities.extractor import StatedWords, extract, stated_words
from shards.entities.observations import observation_class
from shards.entities.vocabulary import EXCLUDED, NORMAL_OBSERVATIONS, TAIL
from shards.strict_json import JsonError, read_limited

#: Labels that stand for several classes of observations, or for one of another name (after CheXpert's
#: labeller).
_CLASSES: Mapping[str, tuple[str, ...]] = {
    "support device": (
        "device", "tube", "line", "catheter", "picc", "lead", "pacemaker", "stent", "hardware", "drainage",
    ),
    "lung lesion": ("lesion", "nodule", "mass"),
    "lung opacity": ("opacity", "infiltrate"),
    "pleural other": ("thicken",),
    "enlarged cardiomediastinum": ("widen",),
    "edema": ("edema", "congestion"),
    "atelectasis": ("atelectasis", "collapse"),
}  # fmt: skip
_DEVICES, _NO_FINDING = "support device", "no finding"
#: Largest file of labels, in bytes.
_FILE_LIMIT = 1 << 28
#: Columns of such a file beside the labels: the sample's key and the generated report that was labelled.
KEY, TEXT = "key", "generated"


def labelled(names: Sequence[str]) -> list[str]:
    """The labels of a dataset that the rules can tell: those whose name is a class of observations."""
    classes = _classes(names)
    return [name for name in names if plain(name) == _NO_FINDING or classes.get(name)]


def stated(texts: Sequence[str], names: Sequence[str]) -> LabelTable:
    """Labels of reports by the rules of `shards.entities`.

    Args:
        texts: N reports, whole or as words joined by spaces.
        names: those of `labelled`.

    Returns:
        [N, C]: 1 where a sentence states the finding, else -1 where one is uncertain, else 0 where one denies
        it, else NaN. "No Finding" is 1 where no other label but devices is 1 or -1, else 0 (CheXpert).
    """
    classes = _classes(names)
    values = np.full((len(texts), len(names)), np.nan)
    for row, text in enumerate(texts):
        found: dict[str, set[int]] = {}
        for entity in extract({"findings": text}):
            found.setdefault(observation_class(entity.observation), set()).add(entity.value)
        for column, name in enumerate(names):
            said = set().union(*(found.get(one, set()) for one in classes.get(name, ())))
            values[row, column] = next((value for value in (1, -1, 0) if value in said), np.nan)
    table = LabelTable(names, values)
    for column, name in enumerate(names):
        if plain(name) == _NO_FINDING:
            devices = [other for other in names if plain(other).removesuffix("s") == _DEVICES]
            values[:, column] = no_finding(table, [name, *devices])
    return table


def marked(text: str, names: Sequence[str]) -> tuple[str, list[StatedWords]]:
    """A report in lower case with one space between words, and the words in it that state one of the labels.

    Args:
        names: those of `labelled`; "No Finding" is stated by no words of its own.
    """
    wanted = {one for classes in _classes(names).values() for one in classes}
    shown, found = stated_words(text)
    return shown, [of for of in found if wanted & {observation_class(name) for name in of.observations}]


def read_labels(path: Path, texts: Mapping[str, str]) -> LabelTable:
    """Labels that another labeller gave the generated reports.

    Args:
        path: CSV with the columns `KEY`, `TEXT` and one a label (1, 0, -1, or empty for not mentioned).
        texts: sample key -> its generated report; a row of another text is refused, whatever its key.

    Returns:
        [N, C] in the order of `texts`.

    Raises:
        EvaluationError: a column, a row or a value is missing or wrong.
    """
    try:
        content = read_limited(path, _FILE_LIMIT).decode("utf-8-sig")
    except (OSError, JsonError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path}: cannot be read ({type(error).__name__})") from error
    reader = csv.DictReader(io.StringIO(content, newline=""))
    columns = list(reader.fieldnames or [])
    if missing := [name for name in (KEY, TEXT) if name not in columns]:
        raise EvaluationError(f"{path}: no column {missing[0]!r}; there are {', '.join(columns)}")
    names = [name for name in columns if name not in (KEY, TEXT, "reference")]
    rows: dict[str, list[float]] = {}
    for number, cells in enumerate(reader, start=2):
        key = cells[KEY]
        if key in rows or texts.get(key) != cells[TEXT]:
            reason = "stands twice" if key in rows else "is not the report that was generated of this sample"
            raise EvaluationError(f"{path}: row {number}: {reason}")
        try:
            rows[key] = [float(cells[name]) if cells[name] else np.nan for name in names]
        except (TypeError, ValueError) as error:
            raise EvaluationError(f"{path}: row {number}: a label is not 1, 0, -1 or empty") from error
        if any(value not in (1, 0, -1) and not np.isnan(value) for value in rows[key]):
            raise EvaluationError(f"{path}: row {number}: a label is not 1, 0, -1 or empty")
    if absent := sum(key not in rows for key in texts):
        raise EvaluationError(f"{path}: {absent} of {len(texts)} generated reports have no row")
    values = np.array([rows[key] for key in texts], dtype=np.float64).reshape(len(texts), len(names))
    return LabelTable(names, values)


def _classes(names: Sequence[str]) -> dict[str, list[str]]:
    """Label -> its classes of observations; a class that is a label of its own counts for that one alone."""
    own = {name: _own(name) for name in names}
    result = {}
    for name in names:
        singular = plain(name).removesuffix("s") if plain(name).endswith("devices") else plain(name)
        others = {one for other, one in own.items() if other != name}
        listed = _CLASSES.get(singular, (own[name],))
        result[name] = [one for one in listed if one not in {TAIL, EXCLUDED, *NORMAL_OBSERVATIONS, *others}]
    return result


def _own(name: str) -> str:
    singular = plain(name).removesuffix("s") if plain(name).endswith("devices") else plain(name)
    # "Lung Opacity" and "Lung Lesion" end with a class that they are named after.
    return observation_class(singular)
