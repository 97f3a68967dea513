"""A study as the `<key>.json` member of a shard, and the check that such a member is well formed."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

from shards.format import FORMAT_VERSION
from shards.strict_json import JsonError, parse_json
from shards.study import Box, Study

#: Largest `<key>.json`, in bytes.
METADATA_LIMIT = 1 << 22

#: Field of `<key>.json` -> type of its value.
_FIELDS: dict[str, type] = {
    "study_id": str,
    "patient_id": str,
    "view": str,
    "sections": dict,
    "sentences": list,
    "labels": dict,
    "entities": list,
    "boxes": list,
    "source": str,
    "license": str,
    "extra": dict,
}
#: Fields that format version 2 added.
_ADDED: dict[str, type] = {"masks": list, "anatomy": list, "phrases": list, "questions": list, "lists": list}
_BOX_NUMBERS = ("x", "y", "width", "height")
_SIDES = ("left", "right", "")
_QUESTION_KINDS = ("open", "closed", "")
_QUESTION_WORDS = ("question", "answer", "kind", "topic", "language")
#: Name of a list that samples stand in.
LIST_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
#: Pixels; no image is wider.
_MAX_LENGTH = 1 << 20


def to_metadata(study: Study) -> dict[str, Any]:
    """The JSON object of a study; entities are [anatomy, observation, value], boxes are objects.

    Of the masks only the findings are named, in the order in which `<key>.masks.png` holds them.
    """
    return {
        "study_id": study.study_id,
        "patient_id": study.patient_id,
        "view": study.view,
        "sections": study.sections,
        "sentences": study.sentences,
        "labels": study.labels,
        "entities": [[entity.anatomy, entity.observation, entity.value] for entity in study.entities],
        "boxes": [_box_fields(box) for box in study.boxes],
        "masks": list(study.masks),
        "anatomy": [_box_fields(box) for box in study.anatomy],
        "phrases": [
            {"text": phrase.text, "boxes": [_box_fields(box) for box in phrase.boxes]}
            for phrase in study.phrases
        ],
        "questions": [{name: getattr(item, name) for name in _QUESTION_WORDS} for item in study.questions],
        "lists": study.lists,
        "source": study.source,
        "license": study.license,
        "extra": study.extra,
    }


def _box_fields(box: Box) -> dict[str, Any]:
    return {name: getattr(box, name) for name in ("label", *_BOX_NUMBERS, "side", "reader")}


def metadata_bytes(metadata: dict[str, Any]) -> bytes:
    """UTF-8 JSON; equal metadata always gives equal bytes."""
    return json.dumps(metadata, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()


def parse_metadata(data: bytes, label_names: Sequence[str], version: int = FORMAT_VERSION) -> dict[str, Any]:
    """The object of a `<key>.json`, which is as `to_metadata` makes it.

    Args:
        data: the member. label_names, version: of the dataset; what a version lacks is empty.

    Raises:
        JsonError: what is wrong, without any of its content.
    """
    metadata = parse_json(data, METADATA_LIMIT)
    if problems := metadata_problems(metadata, label_names, version):
        raise JsonError("; ".join(problems))
    checked: dict[str, Any] = metadata
    if version == 1:
        checked["boxes"] = [{**box, "side": "", "reader": ""} for box in checked["boxes"]]
        checked |= {name: [] for name in _ADDED}
    return checked


def metadata_problems(
    metadata: object, label_names: Sequence[str], version: int = FORMAT_VERSION
) -> list[str]:
    """What is wrong with a parsed `<key>.json` of a format version, one phrase each; empty when all is well.

    Hand-written: sixteen fields do not warrant another dependency. Phrases hold nothing of the sample.
    """
    if not isinstance(metadata, dict):
        return ["metadata is not a JSON object"]
    fields = _FIELDS if version == 1 else _FIELDS | _ADDED
    unknown = len(metadata.keys() - fields.keys())
    problems = [f"{unknown} unknown fields"] if unknown else []
    problems += [f"missing field {name!r}" for name in sorted(fields.keys() - metadata.keys())]
    for name, kind in fields.items():
        if name in metadata and not isinstance(metadata[name], kind):
            problems.append(f"field {name!r} is not of type {kind.__name__}")
    if problems:
        return problems
    if not metadata["patient_id"]:
        problems.append("empty patient_id")
    if not all(isinstance(text, str) for text in metadata["sections"].values()):
        problems.append("a section is not text")
    if not all(isinstance(text, str) and text for text in metadata["sentences"]):
        problems.append("a sentence is empty or not text")
    problems += _label_problems(metadata["labels"], label_names)
    if not all(_is_entity(entity) for entity in metadata["entities"]):
        problems.append("an entity is not [anatomy, observation, 1|0|-1]")
    if version == 1:
        if not all(_is_old_box(box) for box in metadata["boxes"]):
            problems.append("a box is not {label, x, y, width, height}")
        return problems
    return problems + _target_problems(metadata, label_names)


def _target_problems(metadata: dict[str, Any], label_names: Sequence[str]) -> list[str]:
    """Of boxes and of the fields that format version 2 added."""
    problems = []
    for name in ("boxes", "anatomy"):
        if not all(_is_box(box) for box in metadata[name]):
            problems.append(f"an item of {name!r} is not {{label, x, y, width, height, side, reader}}")
    masks = metadata["masks"]
    if not all(isinstance(name, str) for name in masks) or not set(masks) <= set(label_names):
        problems.append("a mask is of no label in the index")
    elif len(set(masks)) < len(masks):
        problems.append("two masks are of one label")
    if not all(_is_phrase(phrase) for phrase in metadata["phrases"]):
        problems.append("a phrase is not {text, boxes}")
    if not all(_is_question(question) for question in metadata["questions"]):
        problems.append("a question is not {question, answer, kind, topic, language}")
    lists = metadata["lists"]
    if not all(isinstance(name, str) and LIST_NAME.fullmatch(name) for name in lists):
        problems.append("a list has no plain name")
    elif len(set(lists)) < len(lists):
        problems.append("a list is named twice")
    return problems


def _label_problems(labels: dict[str, object], label_names: Sequence[str]) -> list[str]:
    unknown = len(labels.keys() - set(label_names))
    problems = [f"{unknown} labels are not in the index"] if unknown else []
    if not all(value is None or _is_label(value) for value in labels.values()):
        problems.append("a label is not 1, 0, -1 or null")
    return problems


def _is_label(value: object) -> bool:
    return type(value) is int and -1 <= value <= 1


def _is_entity(entity: object) -> bool:
    return (
        isinstance(entity, list)
        and len(entity) == 3
        and isinstance(entity[0], str)
        and isinstance(entity[1], str)
        and _is_label(entity[2])
    )


def _is_phrase(phrase: object) -> bool:
    return (
        isinstance(phrase, dict)
        and phrase.keys() == {"text", "boxes"}
        and isinstance(phrase["text"], str)
        and phrase["text"] != ""
        and isinstance(phrase["boxes"], list)
        and all(_is_box(box) for box in phrase["boxes"])
    )


def _is_question(question: object) -> bool:
    return (
        isinstance(question, dict)
        and question.keys() == set(_QUESTION_WORDS)
        and all(isinstance(value, str) for value in question.values())
        and question["question"] != ""
        and question["answer"] != ""
        and question["kind"] in _QUESTION_KINDS
        and question["topic"] == question["topic"].lower()
    )


def _is_box(box: object) -> bool:
    return (
        isinstance(box, dict)
        and box.keys() == {"label", *_BOX_NUMBERS, "side", "reader"}
        and all(isinstance(box[name], str) for name in ("label", "side", "reader"))
        and box["side"] in _SIDES
        and all(_is_length(box[name]) and box[name] >= 0 for name in _BOX_NUMBERS)
        and box["width"] > 0
        and box["height"] > 0
    )


def _is_old_box(box: object) -> bool:
    return (
        isinstance(box, dict)
        and box.keys() == {"label", *_BOX_NUMBERS}
        and isinstance(box["label"], str)
        and all(_is_length(box[name]) for name in _BOX_NUMBERS)
    )


def _is_length(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) <= _MAX_LENGTH
