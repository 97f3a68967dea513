"""The YAML that says what the columns of a table mean."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from shards.errors import DataError
from shards.text.headings import LANGUAGES, SECTION_NAMES


@dataclass
class TableMap:
    """Column names by meaning; all but `image` and `patient_id` may be left out.

    Attributes:
        image: path of the image file under the image folder.
        patient_id: patient; decides the split.
        id: identifier of the row, unique in the table; default: the image path.
        study_id: study; several rows may share one. Default: the row's `id`.
        group: decides the split in place of the patient (families, sites).
        split: split each row belongs to; empty cells are hashed.
        view: projection.
        license: licence of the row.
        report: whole report, split into its sections.
        addendum ... technique: text of one section, where the table has a column for it.
        labels: columns that hold 1, 0, -1 or nothing; or finding -> column; or finding ->
            {column, equals}, which is 1 where the column holds that text.
        language: of the reports; decides whose headings open their sections (`shards.text.headings`).
        findings_without_heading: findings may stand without a heading behind "COMPARISON: None." and an empty
            line (MIMIC-CXR); see `shards.text.sections.split_sections`.
        extra: columns kept as text in the sample's `extra`.
        encoding: encoding of the table's text.
        source: name stored in each sample; default: the table's file name without its ending.
    """

    image: str = MISSING
    patient_id: str = MISSING
    id: str | None = None
    study_id: str | None = None
    group: str | None = None
    split: str | None = None
    view: str | None = None
    license: str | None = None
    report: str | None = None
    addendum: str | None = None
    comparison: str | None = None
    examination: str | None = None
    findings: str | None = None
    history: str | None = None
    impression: str | None = None
    indication: str | None = None
    preliminary: str | None = None
    recommendation: str | None = None
    technique: str | None = None
    labels: Any = None
    language: str = "en"
    findings_without_heading: bool = False
    extra: list[str] = field(default_factory=list)
    encoding: str = "utf-8"
    source: str | None = None

    @property
    def section_columns(self) -> dict[str, str]:
        """Section name -> its column, for the mapped sections in the order of the fields above."""
        columns = {name: getattr(self, name) for name in _SECTION_FIELDS}
        return {name: column for name, column in columns.items() if column is not None}

    @property
    def has_text(self) -> bool:
        """Whether rows are expected to have a report."""
        return self.report is not None or bool(self.section_columns)

    @property
    def columns(self) -> list[str]:
        """All mapped columns, each once."""
        single = (self.image, self.patient_id, self.id, self.study_id, self.group, self.split, self.view)
        rules = label_rules(self)
        names = [*single, self.license, self.report, *self.section_columns.values()]
        names += [rule.column for rule in rules.values()] + self.extra
        return list(dict.fromkeys(name for name in names if name is not None))


@dataclass(frozen=True)
class LabelRule:
    """Where a label comes from: the values of `column`, or whether it holds the text `equals`."""

    column: str
    equals: str | None = None


_SECTION_FIELDS = [item.name for item in fields(TableMap) if item.name in SECTION_NAMES]
_KEYS = [item.name for item in fields(TableMap)]


def read_map(path: Path) -> TableMap:
    """Read and check a map.

    Raises:
        DataError: no such file, no YAML, an unknown or missing key, or a value of the wrong type.
    """
    try:
        given = OmegaConf.to_container(OmegaConf.load(path))
    except OSError as error:
        raise DataError(f"cannot read map {path}: {error.strerror}") from error
    except (YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise DataError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(given, dict):
        raise DataError(f"{path}: a map is `key: column` lines; the keys are {', '.join(_KEYS)}")
    for key in given:
        if key not in _KEYS:
            raise DataError(f"{path}: unknown key {key!r}{nearest(str(key), _KEYS)}")
    for key in ("image", "patient_id"):
        if given.get(key) is None:
            raise DataError(f"{path}: key {key!r} is missing: name the column that holds it")
    try:
        table_map = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TableMap), given))
    except OmegaConfBaseException as error:
        raise DataError(f"{path}: {error.full_key}: {str(error).splitlines()[0]}") from error
    assert isinstance(table_map, TableMap)
    if table_map.language not in LANGUAGES:
        raise DataError(
            f"{path}: language: {table_map.language!r} is unknown{nearest(table_map.language, LANGUAGES)}"
        )
    try:
        label_rules(table_map)
        "".encode(table_map.encoding)
    except ValueError as error:
        raise DataError(f"{path}: labels: {error}") from error
    except LookupError as error:
        raise DataError(f"{path}: encoding: {error}") from error
    return table_map


def label_rules(table_map: TableMap) -> dict[str, LabelRule]:
    """Finding -> rule, in the order of the map.

    Raises:
        ValueError: `labels` is none of the three forms.
    """
    labels = table_map.labels or {}
    if isinstance(labels, list) and all(isinstance(column, str) for column in labels):
        return {column: LabelRule(column) for column in labels}
    if not isinstance(labels, dict):
        raise ValueError("give a list of columns, or finding: column lines")
    return {str(name): _label_rule(str(name), value) for name, value in labels.items()}


def nearest(name: str, names: Collection[str]) -> str:
    """ ", did you mean 'x'?" for the most similar of `names`, or all of them where none is similar."""
    matches = difflib.get_close_matches(name, names, n=1)
    return f", did you mean {matches[0]!r}?" if matches else f"; there are: {', '.join(names)}"


def _label_rule(name: str, value: object) -> LabelRule:
    if isinstance(value, str):
        return LabelRule(value)
    if isinstance(value, dict) and value.keys() == {"column", "equals"}:
        return LabelRule(str(value["column"]), str(value["equals"]))
    raise ValueError(f"{name}: give a column, or {{column: name, equals: text}}")
