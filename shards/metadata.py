"""A study as the `<key>.json` member of a shard, and the check that such a member is well formed."""

from __future__ import annotations

import json
from typing import Any

from shards.study import Study

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
_LABEL_VALUES = (1, 0, -1, None)
_BOX_NUMBERS = ("x", "y", "width", "height")


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


def metadata_problems(metadata: object, label_names: list[str]) -> list[str]:
    """What is wrong with a parsed `<key>.json`, one phrase each; empty when all is well.

    Hand-written: eleven fields do not warrant another dependency. Phrases hold no values of the sample.
    """
    if not isinstance(metadata, dict):
        return ["metadata is not a JSON object"]
    problems = [f"unknown field {name!r}" for name in sorted(metadata.keys() - _FIELDS.keys())]
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


def _label_problems(labels: dict[str, object], label_names: list[str]) -> list[str]:
    problems = [f"label {name!r} is not in the index" for name in labels if name not in label_names]
    if not all(value in _LABEL_VALUES and not isinstance(value, bool) for value in labels.values()):
        problems.append("a label is not 1, 0, -1 or null")
    return problems


def _is_entity(entity: object) -> bool:
    return (
        isinstance(entity, list)
        and len(entity) == 3
        and isinstance(entity[0], str)
        and isinstance(entity[1], str)
        and entity[2] in _LABEL_VALUES[:3]
    )


def _is_box(box: object) -> bool:
    return (
        isinstance(box, dict)
        and box.keys() == {"label", *_BOX_NUMBERS}
        and isinstance(box["label"], str)
        and all(isinstance(box[name], int | float) for name in _BOX_NUMBERS)
    )
