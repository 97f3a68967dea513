"""A study as the `<key>.json` member of a shard, and the check that such a member is well formed."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from shards.strict_json import JsonError, parse_json
from shards.study import Study

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
_BOX_NUMBERS = ("x", "y", "width", "height")
#: Pixels; no image is wider.
_MAX_LENGTH = 1 << 20


def to_metadata(study: Study) -> dict[str, Any]:
    """The JSON object of a study; entities are [anatomy, observation, value], boxes are objects."""
    return {
        "study_id": study.study_id,
        "patient_id": study.patient_id,
        "view": study.view,
        "sections": study.sections,
        "sentences": study.sentences,
        "labels": study.labels,
        "entities": [[entity.anatomy, entity.observation, entity.value] for entity in study.entities],
        "boxes": [
            {"label": box.label, "x": box.x, "y": box.y, "width": box.width, "height": box.height}
            for box in study.boxes
        ],
        "source": study.source,
        "license": study.license,
        "extra": study.extra,
    }


def metadata_bytes(metadata: dict[str, Any]) -> bytes:
    """UTF-8 JSON; equal metadata always gives equal bytes."""
    return json.dumps(metadata, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()


def parse_metadata(data: bytes, label_names: Sequence[str]) -> dict[str, Any]:
    """The object of a `<key>.json`, which is as `to_metadata` makes it.

    Raises:
        JsonError: what is wrong, without any of its content.
    """
    metadata = parse_json(data, METADATA_LIMIT)
    if problems := metadata_problems(metadata, label_names):
        raise JsonError("; ".join(problems))
    checked: dict[str, Any] = metadata
    return checked


def metadata_problems(metadata: object, label_names: Sequence[str]) -> list[str]:
    """What is wrong with a parsed `<key>.json`, one phrase each; empty when all is well.

    Hand-written: eleven fields do not warrant another dependency. Phrases hold nothing of the sample.
    """
    if not isinstance(metadata, dict):
        return ["metadata is not a JSON object"]
    unknown = len(metadata.keys() - _FIELDS.keys())
    problems = [f"{unknown} unknown fields"] if unknown else []
    problems += [f"missing field {name!r}" for name in sorted(_FIELDS.keys() - metadata.keys())]
    for name, kind in _FIELDS.items():
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
    if not all(_is_box(box) for box in metadata["boxes"]):
        problems.append("a box is not {label, x, y, width, height}")
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


def _is_box(box: object) -> bool:
    return (
        isinstance(box, dict)
        and box.keys() == {"label", *_BOX_NUMBERS}
        and isinstance(box["label"], str)
        and all(_is_length(box[name]) for name in _BOX_NUMBERS)
    )


def _is_length(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) <= _MAX_LENGTH
