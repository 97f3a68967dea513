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
    """A place in an image, in pixels: left, top, width, height.

    Attributes:
        label: finding, or name of the region of anatomy.
        side: "left" or "right" of the patient, "" where it is neither or not known.
        reader: who drew it, where the source says so.
    """

    label: str
    x: float
    y: float
    width: float
    height: float
    side: str = ""
    reader: str = ""


@dataclass(frozen=True)
class Phrase:
    """Words of a report and where in the image they are true; `label` of a box is the finding, or ""."""

    text: str
    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class Question:
    """A question about the image and its answer.

    Attributes:
        kind: "closed" (yes or no, or one of few), "open" or "".
        topic: what it asks about ("abnormality", "plane", ...), lower case, or "".
        language: of both, as BCP 47 writes it ("en", "zh").
    """

    question: str
    answer: str
    kind: str = ""
    topic: str = ""
    language: str = "en"


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
        boxes: boxes of findings, in pixels of `image`; what lies outside the image is cut off when stored.
        masks: finding -> 0 or 1, of the shape of `image`. A finding without a mask was not looked for; a mask
            of zeros says that it was, and is not there. Findings are label names of the source.
        anatomy: boxes of regions of anatomy.
        phrases: words of the report with the places they speak of.
        questions: questions about the image.
        lists: official id lists and named fractions the image stands in ("train_1", "benchx-valid").
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
    masks: dict[str, NDArray[np.uint8]] = field(default_factory=dict)
    anatomy: list[Box] = field(default_factory=list)
    phrases: list[Phrase] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    lists: list[str] = field(default_factory=list)
    split: str | None = None
    source: str = ""
    license: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
