"""The YAML that says what the columns of a table mean."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from shards.errors import DataError, nearest
from shards.sources.target_rules import TARGET_KEYS, TargetRules, target_rules
from shards.strict_yaml import load_yaml_text
from shards.tables.files import check_encoding
from shards.tables.reading import TableFormat
from shards.tables.rows import MISSING_WORDS
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
        split: split each row belongs to; an empty cell is that of its patient or group.
        view: projection.
        license: licence of the row.
        report: whole report, split into its sections.
        addendum ... technique: text of one section, where the table has a column for it.
        labels: columns that hold 1, 0, -1 or nothing; or finding -> column; or finding -> {column, equals},
            which is 1 where the column holds that text; or finding -> {column, contains, separator}, which is
            1 where it is one of the texts that the separator ("|") joins.
        rows: "image", a row an image, or "target": an image may have several rows, which may differ in what
            they say of boxes, anatomy, masks, phrases and questions, and in nothing else.
        boxes, anatomy, masks, phrases, questions, lists: see `shards.sources.target_rules`.
        language: of the reports; decides whose headings open their sections (`shards.text.headings`).
        findings_without_heading: findings may stand without a heading behind "COMPARISON: None." and an empty
            line (MIMIC-CXR); see `shards.text.sections.split_sections`.
        extra: columns kept as text in the sample's `extra`.
        encoding: encoding of the table's text.
        delimiter: sign between the cells of a CSV or TSV, where it is not that of the name's ending.
        missing: words that mean "no value" in every column, in place of `MISSING_WORDS`.
        source: name stored in each sample; default: the table's file name without its ending.
    """

    image: str
    patient_id: str
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
    rows: str | None = None
    boxes: Any = None
    anatomy: Any = None
    masks: Any = None
    phrases: Any = None
    questions: Any = None
    lists: Any = None
    language: str = "en"
    findings_without_heading: bool = False
    extra: list[str] = field(default_factory=list)
    encoding: str = "utf-8"
    delimiter: str | None = None
    missing: list[str] | None = None
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
    def format(self) -> TableFormat:
        """How the table is written; the image path tells rows from text."""
        missing = MISSING_WORDS if self.missing is None else tuple(self.missing)
        nested = tuple(self.targets.json_columns)
        return TableFormat(self.encoding, self.delimiter, missing, key=self.image, nested=nested)

    @property
    def targets(self) -> TargetRules:
        """What is said of boxes, masks and the like; ValueError as `target_rules`."""
        return target_rules({key: getattr(self, key) for key in TARGET_KEYS})

    @property
    def split_columns(self) -> list[str]:
        """The columns that decide where a row belongs, where no split is named for it."""
        return [self.patient_id, *([self.group] if self.group else [])]

    @property
    def identifiers(self) -> list[str]:
        """The columns that say whose a row is and what it is called."""
        names = (self.image, self.patient_id, self.id, self.study_id, self.group)
        return [name for name in names if name is not None]

    @property
    def image_columns(self) -> list[str]:
        """Mapped columns that say of a whole image what they say."""
        rules = label_rules(self)
        names = [*self.identifiers, self.split, self.view, self.license, self.report]
        names += self.section_columns.values()
        names += [rule.column for rule in rules.values()] + self.extra
        names += self.targets.list_columns
        return [name for name in names if name is not None]

    @property
    def columns(self) -> list[str]:
        """All mapped columns, each once."""
        return list(dict.fromkeys(self.image_columns + self.targets.columns))


@dataclass(frozen=True)
class LabelRule:
    """Where a label comes from: the values of `column`, or whether it holds the text `equals`, or `contains`
    among texts joined by `separator`."""

    column: str
    equals: str | None = None
    contains: str | None = None
    separator: str = "|"

    @property
    def text(self) -> str | None:
        """The text the rule looks for; None where the column holds the label's values themselves."""
        return self.equals if self.contains is None else self.contains

    def texts(self, cell: str) -> list[str]:
        """The texts of a cell that the rule compares with its own."""
        return [cell] if self.contains is None else [part.strip() for part in cell.split(self.separator)]

    def almost_fits(self, cell: str) -> bool:
        """Whether the cell holds the text in another spelling: in capitals, or behind another separator."""
        folded = (self.text or "").casefold()
        parts = self.texts(cell)  # its own text may hold a separator: "Mass/Nodule"
        if self.contains is not None:
            parts += re.split(r"[|,;/\n]", cell.replace(self.separator, "\n"))
        return any(part.strip().casefold() == folded for part in parts)


_SECTION_FIELDS = [item.name for item in fields(TableMap) if item.name in SECTION_NAMES]
_KEYS = [item.name for item in fields(TableMap)]
_LISTS = ("extra", "missing")
_SWITCHES = ("findings_without_heading",)


def read_map(path: Path) -> TableMap:
    """Read and check a map; its values are text as they are written, whatever YAML would make of them.

    Raises:
        DataError: no such file, no YAML, an unknown, missing or repeated key, or a value of the wrong form.
    """
    given = load_yaml_text(path)
    if not isinstance(given, dict):
        raise DataError(f"{path}: a map is `key: column` lines; the keys are {', '.join(_KEYS)}")
    for key in given:
        if key not in _KEYS:
            raise DataError(f"{path}: unknown key {key!r}{nearest(str(key), _KEYS)}")
    for key in ("image", "patient_id"):
        if not given.get(key):
            raise DataError(f"{path}: key {key!r} is missing: name the column that holds it")
    try:
        table_map = TableMap(**{key: _value(key, value) for key, value in given.items() if value != ""})
        label_rules(table_map)
        targets = table_map.targets
        if twice := set(targets.columns) & set(table_map.image_columns) if targets.several else set():
            raise ValueError(
                f"rows: target: column {min(twice)!r} stands for more than boxes, masks, phrases and "
                "questions, so the rows of an image may not differ in it"
            )
        check_encoding(table_map.encoding)
        if table_map.delimiter is not None:
            table_map.format.separator(".csv")
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error
    if table_map.language not in LANGUAGES:
        raise DataError(
            f"{path}: language: {table_map.language!r} is unknown{nearest(table_map.language, LANGUAGES)}"
        )
    return table_map


def label_rules(table_map: TableMap) -> dict[str, LabelRule]:
    """Finding -> rule, in the order of the map.

    Raises:
        ValueError: `labels` is none of the forms.
    """
    labels = table_map.labels or {}
    if isinstance(labels, list) and all(isinstance(column, str) and column for column in labels):
        if len(set(labels)) < len(labels):
            raise ValueError("labels: a column is named twice")
        return {column: LabelRule(column) for column in labels}
    if not isinstance(labels, dict):
        raise ValueError("labels: give a list of columns, or finding: column lines")
    return {name: _label_rule(name, value) for name, value in labels.items()}


def _value(key: str, value: Any) -> Any:
    if key == "labels" or (key in TARGET_KEYS and key != "rows"):
        return value
    if key in _LISTS:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ValueError(f"{key}: give a list")
        return value
    if not isinstance(value, str):
        raise ValueError(f"{key}: give one value, not a {'list' if isinstance(value, list) else 'mapping'}")
    if key in _SWITCHES:
        if value.lower() not in ("true", "false"):
            raise ValueError(f"{key}: {value!r} is neither true nor false")
        return value.lower() == "true"
    return value


def _label_rule(name: str, value: object) -> LabelRule:
    if not name:
        raise ValueError("labels: a finding has no name")
    if isinstance(value, str) and value:
        return LabelRule(value)
    forms = ({"column", "equals"}, {"column", "contains"}, {"column", "contains", "separator"})
    # All but a separator are compared as cells are: without white space at their ends.
    if isinstance(value, dict) and value.keys() in forms and all(_is_word(item) for item in value.values()):
        return LabelRule(
            **{key: item if key in ("separator", "column") else item.strip() for key, item in value.items()}
        )
    raise ValueError(
        f"labels: {name}: give a column, {{column: name, equals: text}}, or "
        "{column: name, contains: text, separator: sign}"
    )


def _is_word(value: object) -> bool:
    return isinstance(value, str) and value != ""
