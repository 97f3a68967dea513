"""The record every source yields and every shard stores: one image with its report."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Label values as stored in `<key>.json`: present, absent, uncertain, not mentioned.
LabelValue = int | None


@dataclass(frozen=True)
class Entity:
    """One anatomy-observation statement; `value` is 1 (present), 0 (absent) or -1 (uncertain)."""

    anatomy: str
    observation: str
    value: int


@dataclass(frozen=True)
class Box:
    """A finding's box in pixels of the stored image: left, top, width, height."""

    label: str
    x: float
    y: float
    width: float
    height: float


@dataclass
class Study:
    """One image of a study with its text and whatever is known about it.

    Attributes:
        study_id: identifier of the study in its source; several images may share one.
        patient_id: identifier of the patient; decides the split.
        image: 8-bit grayscale pixels [height, width].
        view: projection as the source names it ("PA", "AP", "LATERAL", ""), upper case.
        sections: report sections by lower-case name ("findings", "impression", ...).
        sentences: the sentences of all sections in report order.
        labels: finding name -> 1 present, 0 absent, -1 uncertain, None not mentioned.
        entities: anatomy-observation statements.
        boxes: boxes of findings, in pixels of `image`.
        mask: optional 8-bit index mask [height, width]: 0 background, k the finding number k (from 1) of the
            source's label names.
        split: split the source prescribes ("train", "valid", "test"), or None to hash by patient.
        source: name of the source; `license`: licence of this very sample.
        extra: JSON-serialisable values a source wants to keep (never read by training).
    """

    study_id: str
    patient_id: str
    image: NDArray[np.uint8]
    view: str = ""
    sections: dict[str, str] = field(default_factory=dict)
    sentences: list[str] = field(default_factory=list)
    labels: dict[str, LabelValue] = field(default_factory=dict)
    entities: list[Entity] = field(default_factory=list)
    boxes: list[Box] = field(default_factory=list)
    mask: NDArray[np.uint8] | None = None
    split: str | None = None
    source: str = ""
    license: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
