"""Source: SLAKE, 14,028 questions in English and Chinese about 642 images, with boxes."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from shards.archives.records import Record, object_records
from shards.archives.source import ArchiveOptions, ArchiveSource, Facts, Identity
from shards.errors import DataError
from shards.sources.base import option
from shards.sources.registry import register
from shards.strict_json import JsonError, parse_json
from shards.study import Box, Question, Study

_FILES = {"train": "train.json", "valid": "validate.json", "test": "test.json"}
_FIELDS = ("img_name", "question", "answer", "q_lang", "answer_type", "content_type", "modality", "location")
_LANGUAGES = {"en": "English", "zh": "Chinese"}
_KINDS = ("closed", "open")
_BOX_LIMIT = 1 << 20
#: Words of box labels that are findings; the other labels are organs.
_FINDINGS = {
    "atelectasis", "cancer", "cardiomegaly", "edema", "effusion", "infiltration", "mass", "nodule",
    "pneumonia", "pneumothorax", "tumor",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SlakeOptions(ArchiveOptions):
    """Options of `medvlp shards build slake`."""

    language: list[str] = option("only questions in en or zh (repeatable)", [])
    modality: list[str] = option("only images of X-Ray, CT or MRI (repeatable)", [])


@register("slake", SlakeOptions)
def open_slake(options: SlakeOptions, image_size: int) -> "SlakeSource":
    """Build from SLAKE: images with questions in English and Chinese, boxes, the official split."""
    return SlakeSource(options)


class SlakeSource(ArchiveSource):
    """One image a record, with all its questions; nothing is known of whose an image is."""

    name = "slake"
    facts = Facts(
        title="SLAKE",
        license="CC BY 4.0",
        access="free",
        origin="https://www.med-vqa.com/slake/ (Slake1.0.zip)",
    )
    options: SlakeOptions

    def prepare(self) -> None:
        """Published numbers, which are of questions; all are counted, whatever the options ask for."""
        self.label_names = []
        english = {"train": 4_919, "valid": 1_053, "test": 1_061}
        self.published = {"images with questions": 642, "questions": 14_028}
        self.published |= {f"{split} questions in English": count for split, count in english.items()}
        for name in self.options.language:
            if name not in _LANGUAGES:
                raise DataError(f"--language {name}: SLAKE's questions are in en and zh")

    def records(self) -> Iterator[Record]:
        """Every image with its questions in the order of the files; questions that cannot be used first."""
        images: dict[str, tuple[str, list[Record]]] = {}
        mixed: set[str] = set()
        for split, file in _FILES.items():
            for item in object_records(self._items(file), file, _FIELDS):
                if problem := item.problem or _problem(item):
                    yield Record(item.file, item.line, {}, problem=problem)
                    continue
                self.found.update(["questions", f"{split} questions in {_LANGUAGES[item['q_lang']]}"])
                first, questions = images.setdefault(item["img_name"], (split, []))
                questions.append(item)
                if first != split:
                    mixed.add(item["img_name"])
        self.found["images with questions"] = len(images)
        yield from self._images(images, mixed)

    def identify(self, record: Record) -> Identity:
        """The name of the image's folder."""
        image = _folder(record["image"])
        return Identity(image, image, image, record["split"])

    def list_id(self, text: str) -> str:
        """The folder's name, also of "xmlab1/source.jpg"."""
        return _folder(text.strip().replace("\\", "/"))

    def studies(self, record: Record) -> list[Study]:
        """The image with its questions, and boxes where they are there."""
        name = record["image"]
        findings, organs = self._boxes(record, name.rpartition("/")[0])
        return [
            Study(
                study_id=_folder(name),
                patient_id=_folder(name),
                image=self.image(f"Slake1.0/imgs/{name}", f"imgs/{name}", placed=bool(findings or organs)),
                boxes=findings,
                anatomy=organs,
                questions=[
                    Question(
                        row["question"],
                        row["answer"],
                        row["answer_type"].lower(),
                        row["content_type"].lower(),
                        row["q_lang"],
                    )
                    for row in record.joined["questions"]
                ],
                extra={"modality": record["modality"], "location": record["location"]},
            )
        ]

    def _items(self, file: str) -> Any:
        return self.texts.json(f"Slake1.0/{file}", file)

    def _images(self, images: dict[str, tuple[str, list[Record]]], mixed: set[str]) -> Iterator[Record]:
        kept = 0
        for name, (split, questions) in images.items():
            first = questions[0]
            if name in mixed:
                problem = "questions about the image stand in several of the files, so its split is unknown"
                yield Record(first.file, first.line, {}, problem=problem)
                continue
            asked = [row for row in questions if row["q_lang"] in (self.options.language or _LANGUAGES)]
            if asked and first["modality"] in (self.options.modality or [first["modality"]]):
                kept += 1
                cells = {name: first[name] for name in ("modality", "location")}
                yield Record(
                    first.file, first.line, cells | {"image": name, "split": split}, {"questions": asked}
                )
        if kept < len(images) - len(mixed):
            self.texts.remarks.append(
                f"{len(images) - len(mixed) - kept:,} images were left out (--language, --modality)"
            )

    def _boxes(self, record: Record, folder: str) -> tuple[list[Box], list[Box]]:
        """Boxes of findings and of organs; none where the archive has no file of them."""
        places = (f"Slake1.0/imgs/{folder}/detection.json", f"imgs/{folder}/detection.json")
        place = next((place for place in places if self.files.find(place) is not None), None)
        if place is None:
            self.notes["images have no detection.json, and so no boxes"] += 1
            return [], []
        try:
            value = parse_json(self.files.read(place, _BOX_LIMIT).removeprefix(b"\xef\xbb\xbf"), _BOX_LIMIT)
            boxes = [_box(label, sides) for item in value for label, sides in item.items()]
        except (JsonError, AttributeError, TypeError, ValueError) as error:
            raise record.error("detection.json of the image is no list of {label: [x, y, w, h]}") from error
        findings = [box for box in boxes if _FINDINGS & set(box.label.lower().split())]
        return findings, [box for box in boxes if box not in findings]


def _box(label: str, sides: list[Any]) -> Box:
    """A box in pixels of the image; underscores of its label are blanks.

    Raises:
        ValueError: it has not four finite sides, or a negative one.
    """
    x, y, width, height = (float(json.dumps(side)) for side in sides)
    if width < 0 or height < 0:
        raise ValueError("negative")
    return Box(" ".join(label.replace("_", " ").split()), x, y, width, height)


def _problem(item: Record) -> str:
    """What is wrong with a question, or ""."""
    for name in ("img_name", "question", "answer"):
        if not item[name]:
            return f"{name!r} is empty"
    if item["q_lang"] not in _LANGUAGES:
        return "'q_lang' is neither en nor zh"
    return "" if item["answer_type"].lower() in _KINDS else "'answer_type' is neither CLOSED nor OPEN"


def _folder(name: str) -> str:
    """Folder of an image such as "xmlab1/source.jpg"."""
    folder = name.rpartition("/")[0] if "." in name.rpartition("/")[2] else name
    return folder.rpartition("/")[2] or name
