"""What a table's map says of boxes, masks, phrases, questions and lists."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from shards.errors import nearest
from shards.images import MAX_PIXELS
from shards.masks import RunKind, RunOrder
from shards.metadata import LIST_NAME

#: Keys of a map that are read here.
TARGET_KEYS = ("rows", "boxes", "anatomy", "masks", "phrases", "questions", "lists")
_BOX_KEYS = ("x", "y", "width", "height", "right", "bottom", "label", "finding", "side", "reader")
_QUESTION_KEYS = ("question", "answer", "kind", "topic", "language")
_RLE_KEYS = {"rle", "kind", "order", "size"}


@dataclass(frozen=True)
class BoxRule:
    """Columns of one box a row; `finding` is the label of all where there is no column of labels.

    Attributes:
        right, bottom: in place of `width` and `height`.
    """

    x: str
    y: str
    width: str | None = None
    height: str | None = None
    right: str | None = None
    bottom: str | None = None
    label: str | None = None
    finding: str | None = None
    side: str | None = None
    reader: str | None = None

    @property
    def places(self) -> tuple[str, ...]:
        """Columns of left, top, and width and height or right and bottom."""
        last = (self.right, self.bottom) if self.width is None else (self.width, self.height)
        return tuple(column for column in (self.x, self.y, *last) if column is not None)

    @property
    def columns(self) -> list[str]:
        """All columns."""
        return [*self.places, *(column for column in (self.label, self.side, self.reader) if column)]


@dataclass(frozen=True)
class MaskRule:
    """Where the masks of one finding are.

    Attributes:
        rle: column of run lengths ("-1": nothing is there); `kind` and `order` as `shards.masks.decode_runs`
            has them.
        size: width and height in which the runs were counted; None: those of the image.
        png: column of paths of PNG files. file: path of the PNG file, with {path} (the image's, without its
            ending) or {stem} (its last part) in it.
    """

    rle: str | None = None
    kind: RunKind = "absolute"
    order: RunOrder = "columns"
    size: tuple[int, int] | None = None
    png: str | None = None
    file: str | None = None


@dataclass(frozen=True)
class TargetRules:
    """The rules of a map; where a rule is the name of a column, its cells hold JSON.

    Attributes:
        several: an image may have several rows, one a box, mask, phrase or question.
        phrases: {"text": column} for the words that the box of the row belongs to.
        lists: columns that say whether a row stands in the list of their name, or one column of names that
            "|" joins.
    """

    several: bool = False
    boxes: BoxRule | str | None = None
    anatomy: BoxRule | str | None = None
    masks: dict[str, MaskRule] = field(default_factory=dict)
    phrases: dict[str, str] | str | None = None
    questions: dict[str, str] | str | None = None
    lists: list[str] | str | None = None

    @property
    def json_columns(self) -> list[str]:
        """Columns whose cells hold JSON."""
        rules = (self.boxes, self.anatomy, self.phrases, self.questions)
        return [rule for rule in rules if isinstance(rule, str)]

    @property
    def columns(self) -> list[str]:
        """Columns in which the rows of one image may differ."""
        found = self.json_columns
        for boxes in (self.boxes, self.anatomy):
            found += boxes.columns if isinstance(boxes, BoxRule) else []
        found += [column for rule in self.masks.values() for column in (rule.rle, rule.png) if column]
        for texts in (self.phrases, self.questions):
            found += texts.values() if isinstance(texts, dict) else []
        return found

    @property
    def findings(self) -> list[str]:
        """Findings that the map itself names."""
        named = [self.boxes.finding] if isinstance(self.boxes, BoxRule) and self.boxes.finding else []
        return [*self.masks, *named]

    @property
    def list_columns(self) -> list[str]:
        """Columns of lists."""
        return [self.lists] if isinstance(self.lists, str) else self.lists or []


def target_rules(given: Mapping[str, Any]) -> TargetRules:
    """The rules of a map.

    Args:
        given: the keys of `TARGET_KEYS` that the map has; text and None, lists and mappings of it.

    Raises:
        ValueError: a rule is of none of the forms; names the key.
    """
    rows = given.get("rows") or "image"
    if rows not in ("image", "target"):
        raise ValueError(f"rows: {rows!r} is neither image nor target")
    rules = TargetRules(
        several=rows == "target",
        boxes=_boxes("boxes", given.get("boxes")),
        anatomy=_boxes("anatomy", given.get("anatomy")),
        masks={name: _mask(name, rule) for name, rule in _mapping("masks", given.get("masks")).items()},
        phrases=_texts("phrases", given.get("phrases"), ("text",), ("text",)),
        questions=_texts("questions", given.get("questions"), _QUESTION_KEYS, ("question", "answer")),
        lists=_lists(given.get("lists")),
    )
    if isinstance(rules.phrases, dict) and not isinstance(rules.boxes, BoxRule):
        raise ValueError("phrases: {text: column} takes the box of the row, so boxes must name columns too")
    return rules


def _boxes(key: str, value: Any) -> BoxRule | str | None:
    if value is None or (isinstance(value, str) and value):
        return value
    rule = _columns(key, value, _BOX_KEYS)
    sized = rule.keys() & {"width", "height", "right", "bottom"}
    if not {"x", "y"} <= rule.keys() or sized not in ({"width", "height"}, {"right", "bottom"}):
        raise ValueError(f"{key}: name the columns x, y, and width and height or right and bottom")
    if ("label" in rule) == ("finding" in rule):
        raise ValueError(f"{key}: give label (a column) or finding (a name)")
    return BoxRule(**rule)


def _mask(finding: str, value: Any) -> MaskRule:
    where = f"masks: {finding}"
    forms = "{rle: column, kind: absolute or relative}, {png: column} or {file: path}"
    if not finding or not isinstance(value, dict):
        raise ValueError(f"{where}: give {forms}")
    rule = dict(value)
    size = rule.pop("size", None)
    if size is not None:
        sides = size if isinstance(size, list) else []
        if len(sides) != 2 or not all(
            isinstance(s, str) and s.isdecimal() and 0 < int(s) < 1 << 16 for s in sides
        ):
            raise ValueError(f"{where}: size: give [width, height]")
        size = (int(sides[0]), int(sides[1]))
        if size[0] * size[1] > MAX_PIXELS:
            raise ValueError(f"{where}: size: more than {MAX_PIXELS} pixels")
    if not all(isinstance(text, str) and text for text in rule.values()):
        raise ValueError(f"{where}: give {forms}")
    if rule.keys() in ({"png"}, {"file"}) and size is None:
        if "file" in rule and not any(name in rule["file"] for name in ("{path}", "{stem}")):
            raise ValueError(f"{where}: file: {{path}} or {{stem}} of the image must stand in it")
        return MaskRule(**rule)
    if not {"rle", "kind"} <= rule.keys() <= _RLE_KEYS:
        raise ValueError(f"{where}: give {forms}")
    if rule["kind"] not in ("absolute", "relative"):
        raise ValueError(f"{where}: kind: {rule['kind']!r} is neither absolute nor relative")
    if rule.get("order", "columns") not in ("columns", "rows"):
        raise ValueError(f"{where}: order: {rule['order']!r} is neither columns nor rows")
    return MaskRule(**rule, size=size)


def _texts(
    key: str, value: Any, known: tuple[str, ...], required: tuple[str, ...]
) -> dict[str, str] | str | None:
    if value is None or (isinstance(value, str) and value):
        return value
    rule = _columns(key, value, known)
    if not set(required) <= rule.keys():
        raise ValueError(f"{key}: name the columns {' and '.join(required)}, or one column of JSON")
    return rule


def _lists(value: Any) -> list[str] | str | None:
    if value is None or (isinstance(value, str) and value):
        return value
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError("lists: give a list of columns, or one column of names")
    if not all(LIST_NAME.fullmatch(name) for name in value) or len(set(value)) < len(value):
        raise ValueError("lists: names are letters, digits, '.', '_' and '-', each once")
    return value


def _columns(key: str, value: Any, known: tuple[str, ...]) -> dict[str, str]:
    rule = _mapping(key, value)
    for name, column in rule.items():
        if name not in known:
            raise ValueError(f"{key}: unknown key {name!r}{nearest(name, known)}")
        if not isinstance(column, str) or not column:
            raise ValueError(f"{key}: {name}: give a column")
    return rule


def _mapping(key: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{key}: give `name: value` lines, or (but for masks) one column of JSON")
    return value
