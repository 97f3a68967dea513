"""Boxes, masks, phrases, questions and lists of an image, from the rows of a table that are about it."""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from shards.errors import DataError
from shards.images import read_image_file
from shards.masks import decode_runs, read_mask_image
from shards.metadata import LIST_NAME, METADATA_LIMIT
from shards.sources.base import RejectedRecord
from shards.sources.image_paths import ImagePaths
from shards.sources.target_rules import BoxRule, MaskRule, TargetRules
from shards.strict_json import JsonError, parse_json
from shards.study import Box, Phrase, Question
from shards.tables.rows import Row

_PLACES = {"x", "y", "width", "height"}, {"x", "y", "right", "bottom"}
_BOX_WORDS = {"label", "side", "reader"}
_QUESTION_WORDS = {"kind", "topic", "language"}
_IN_LIST = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False, "": False}
#: Pixels; no image is wider.
_MAX_LENGTH = 1 << 20


@dataclass
class Targets:
    """The fields of a `Study` that are read here."""

    boxes: list[Box] = field(default_factory=list)
    anatomy: list[Box] = field(default_factory=list)
    masks: dict[str, NDArray[np.uint8]] = field(default_factory=dict)
    phrases: list[Phrase] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    lists: list[str] = field(default_factory=list)

    @property
    def have_places(self) -> bool:
        """Whether any says where in the image something lies."""
        return bool(self.boxes or self.anatomy or self.masks or any(one.boxes for one in self.phrases))


class TargetReader:
    """Reads targets by the rules of a map.

    Args:
        rules: of the map.
        paths: image folder, below which the files of masks lie.
    """

    def __init__(self, rules: TargetRules, paths: ImagePaths) -> None:
        self._rules = rules
        self._paths = paths
        #: What was done to read masks -> how often.
        self.notes: Counter[str] = Counter()
        # Of each row and rule of a file 32 bytes for image and file; then the files of several images.
        self._pairs = bytearray()
        self._shared: frozenset[bytes] = frozenset()

    def boxes_of(self, row: Row) -> dict[str, list[Box]]:
        """The boxes of a row by the map's keys for them; none where they cannot be read."""
        found: dict[str, list[Box]] = {"boxes": [], "anatomy": [], "phrases": []}
        with suppress(RejectedRecord):
            found["boxes"] = self._boxes(self._rules.boxes, "boxes", row)
        with suppress(RejectedRecord):
            found["anatomy"] = self._boxes(self._rules.anatomy, "anatomy", row)
        with suppress(RejectedRecord):
            found["phrases"] = [box for phrase in self._phrases(row) for box in phrase.boxes]
        return found

    def see(self, name: str) -> None:
        """Take in the path of an image before any is read: `{stem}` may give several the file of one."""
        for rule in self._rules.masks.values():
            if rule.file is not None and PurePosixPath(name).name:
                self._pairs += self._digest(name) + self._digest(_file_of(rule.file, name))

    def have_seen(self) -> None:
        """All images have been taken in."""
        if not self._pairs:
            return
        pairs = np.unique(np.frombuffer(bytes(self._pairs), "V32")).view("V16")[1::2]
        files, images = np.unique(pairs, return_counts=True)
        self._shared = frozenset(digest.tobytes() for digest in files[images > 1])
        self._pairs = bytearray()

    def _digest(self, path: str) -> bytes:
        return hashlib.blake2b(self._paths.identity(path).encode(), digest_size=16).digest()

    def read(self, rows: Sequence[Row], name: str, shape: tuple[int, int]) -> Targets:
        """The targets of an image.

        Args:
            rows: that are about it. name: its path. shape: its height and width.

        Raises:
            RejectedRecord: a cell does not hold what the map says; names column and line.
        """
        targets = Targets(lists=self._lists(rows[0]))
        texts: dict[str, list[Box]] = {}
        for row in rows:
            boxes = self._boxes(self._rules.boxes, "boxes", row)
            targets.boxes += boxes
            targets.anatomy += self._boxes(self._rules.anatomy, "anatomy", row)
            targets.questions += self._questions(row)
            if isinstance(self._rules.phrases, dict):
                text = row[self._rules.phrases["text"]]
                if text:
                    texts.setdefault(text, []).extend(boxes)
            else:
                targets.phrases += self._phrases(row)
            for finding, rule in self._rules.masks.items():
                mask = self._mask(finding, rule, row, name, shape)
                if mask is None:
                    continue
                earlier = targets.masks.get(finding, mask)
                if earlier.any() != mask.any():
                    reason = f"mask of {finding!r}: one row says that nothing is there, another has a mask"
                    raise RejectedRecord(reason, line=row.line)
                targets.masks[finding] = earlier | mask
        targets.phrases += [Phrase(text, tuple(boxes)) for text, boxes in texts.items()]
        return targets

    def _boxes(self, rule: BoxRule | str | None, key: str, row: Row) -> list[Box]:
        if rule is None:
            return []
        if isinstance(rule, str):
            return [_json_box(item) for item in _items(row, rule, _is_box(True), key)]
        cells = [row[column] for column in rule.places]
        if not any(cells):
            return []
        numbers = [_number(cell) for cell in cells]
        for column, number in zip(rule.places, numbers, strict=True):
            if number is None:
                raise RejectedRecord(f"column {column!r} of {key} holds no number", line=row.line)
        label = rule.finding or (row[rule.label] if rule.label else "")
        if not label:
            raise RejectedRecord(f"column {rule.label!r} of {key} is empty beside a box", line=row.line)
        side = row[rule.side].lower() if rule.side else ""
        if side not in ("left", "right", ""):
            raise RejectedRecord(f"column {rule.side!r} holds neither left nor right", line=row.line)
        x, y, *last = (number for number in numbers if number is not None)
        width, height = last if rule.width else (last[0] - x, last[1] - y)
        if width < 0 or height < 0:
            raise RejectedRecord(f"a box of {key} ends before it begins", line=row.line)
        return [Box(label, x, y, width, height, side, row[rule.reader] if rule.reader else "")]

    def _phrases(self, row: Row) -> list[Phrase]:
        if not isinstance(self._rules.phrases, str):
            return []
        items = _items(row, self._rules.phrases, _is_phrase, "phrases")
        return [Phrase(item["text"], tuple(_json_box(box) for box in item["boxes"])) for item in items]

    def _questions(self, row: Row) -> list[Question]:
        rule = self._rules.questions
        if isinstance(rule, str):
            return [_json_question(item) for item in _items(row, rule, _is_question, "questions")]
        if rule is None:
            return []
        cells = {name: row[column] for name, column in rule.items()}
        if not cells["question"] and not cells["answer"]:
            return []
        given = {name: cell for name, cell in cells.items() if cell}
        if not _is_question(given):
            raise RejectedRecord(
                "a question lacks question or answer, or its kind is neither open nor closed", line=row.line
            )
        return [_json_question(given)]

    def _lists(self, row: Row) -> list[str]:
        rule = self._rules.lists
        if isinstance(rule, str):
            names = list(dict.fromkeys(name.strip() for name in row[rule].split("|") if name.strip()))
            if not all(LIST_NAME.fullmatch(name) for name in names):
                raise RejectedRecord(f"column {rule!r} holds no plain names of lists", line=row.line)
            return names
        for column in rule or []:
            if row[column].lower() not in _IN_LIST:
                raise RejectedRecord(f"list column {column!r} holds neither 1 nor 0", line=row.line)
        return [column for column in rule or [] if _IN_LIST[row[column].lower()]]

    def _mask(
        self, finding: str, rule: MaskRule, row: Row, name: str, shape: tuple[int, int]
    ) -> NDArray[np.uint8] | None:
        """None where nothing is known."""
        try:
            if rule.rle is not None:
                mask = _runs(row[rule.rle], rule, shape)
            else:
                mask = self._mask_file(finding, rule, row, name)
            return None if mask is None else self._fitted(mask, shape)
        except OSError as error:
            raise RejectedRecord(
                f"mask of {finding!r}: cannot be read ({error.strerror})", line=row.line
            ) from error
        except DataError as error:
            raise RejectedRecord(f"mask of {finding!r}: {error}", line=row.line) from error

    def _mask_file(self, finding: str, rule: MaskRule, row: Row, name: str) -> NDArray[np.uint8] | None:
        if rule.file is None:
            given = row[rule.png] if rule.png else ""
            if not given:
                return None
        else:
            given = _file_of(rule.file, name)
        path = self._paths.seek(given)
        if path is not None:
            if rule.file is not None and self._digest(given) in self._shared:
                raise DataError(
                    f"file: {rule.file} names one file for several images; put {{path}} in it, or name the "
                    "files in a column (png)"
                )
            return read_mask_image(read_image_file(path))
        if rule.file is None:
            raise DataError("the file does not exist")
        self.notes[f"images have no file of the mask of {finding!r}"] += 1
        return None

    def _fitted(self, mask: NDArray[np.uint8], shape: tuple[int, int]) -> NDArray[np.uint8]:
        """The mask in the size of its image, where both have the same proportions."""
        if mask.shape == shape:
            return mask
        (height, width), (image_height, image_width) = mask.shape, shape
        # Sides of scaled images are rounded to whole pixels.
        if abs(height * image_width - width * image_height) > max(*mask.shape, *shape):
            raise DataError(f"is {width} x {height} pixels, its image {image_width} x {image_height}")
        self.notes["masks were scaled to the size of their image"] += 1
        scaled = cv2.resize(mask, (image_width, image_height), interpolation=cv2.INTER_NEAREST)
        return np.asarray(scaled, dtype=np.uint8)


def _file_of(pattern: str, name: str) -> str:
    """Path of the mask of an image by `MaskRule.file`."""
    image = PurePosixPath(name.replace("\\", "/"))
    return pattern.replace("{path}", str(image.with_suffix(""))).replace("{stem}", image.stem)


def _runs(text: str, rule: MaskRule, shape: tuple[int, int]) -> NDArray[np.uint8] | None:
    """None for an empty cell, of which nothing is known."""
    height, width = shape if rule.size is None else rule.size[::-1]
    if text == "-1":
        return np.zeros((height, width), np.uint8)
    return decode_runs(text, height, width, rule.kind, rule.order) if text else None


def _items(row: Row, column: str, is_one: Callable[[Any], bool], what: str) -> Iterator[Any]:
    """The items of a JSON list in a cell; none where it is empty."""
    if not row[column]:
        return
    try:
        items = parse_json(row[column], METADATA_LIMIT)
    except JsonError as error:
        raise RejectedRecord(f"column {column!r} of {what} holds no JSON ({error})", line=row.line) from None
    if not isinstance(items, list) or not all(is_one(item) for item in items):
        raise RejectedRecord(
            f"column {column!r} is no JSON list of {what} as the README has them", line=row.line
        )
    yield from items


def _number(value: Any) -> float | None:
    """A finite number, or the text of one (JSON lines give numbers as text); None where it is none."""
    try:
        number = (
            float(value) if isinstance(value, str | float | int) and not isinstance(value, bool) else math.nan
        )
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and abs(number) <= _MAX_LENGTH else None


def _is_box(labelled: bool) -> Callable[[Any], bool]:
    def is_box(item: Any) -> bool:
        if not isinstance(item, dict) or (labelled and not item.get("label")):
            return False
        places = item.keys() - _BOX_WORDS
        if places not in _PLACES or any(_number(item[name]) is None for name in places):
            return False
        words = [item[name] for name in item.keys() & _BOX_WORDS]
        if not all(isinstance(word, str) for word in words) or item.get("side", "") not in (
            "left",
            "right",
            "",
        ):
            return False
        box = _json_box(item)
        return box.width >= 0 and box.height >= 0

    return is_box


def _json_box(item: dict[str, Any]) -> Box:
    x, y, *last = (
        float(item[name]) for name in ("x", "y", "width", "height", "right", "bottom") if name in item
    )
    width, height = last if "width" in item else (last[0] - x, last[1] - y)
    return Box(item.get("label", ""), x, y, width, height, item.get("side", ""), item.get("reader", ""))


def _is_phrase(item: Any) -> bool:
    return (
        isinstance(item, dict)
        and item.keys() == {"text", "boxes"}
        and isinstance(item["text"], str)
        and item["text"].strip() != ""
        and isinstance(item["boxes"], list)
        and all(_is_box(False)(box) for box in item["boxes"])
    )


def _is_question(item: Any) -> bool:
    return (
        isinstance(item, dict)
        and {"question", "answer"} <= item.keys() <= {"question", "answer", *_QUESTION_WORDS}
        and all(isinstance(word, str) and word for word in item.values())
        and item.get("kind", "open").lower() in ("open", "closed")
    )


def _json_question(item: dict[str, str]) -> Question:
    return Question(
        item["question"],
        item["answer"],
        item.get("kind", "").lower(),
        item.get("topic", "").lower(),
        item.get("language", "en"),
    )
