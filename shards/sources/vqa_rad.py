"""Source: VQA-RAD, 3,515 questions about 314 images of head, chest and abdomen."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from shards.archives.records import Record, object_records
from shards.archives.source import ArchiveOptions, ArchiveSource, Facts, Identity
from shards.errors import DataError
from shards.sources.base import option
from shards.sources.registry import register
from shards.study import Question, Study

_PUBLIC = "VQA_RAD Dataset Public.json"
_MEVF = {"train": "trainset.json", "test": "testset.json"}
#: What some copies hold, made of the train questions.
_OTHER = "valset.json"
_FIELDS = ("image_name", "image_organ", "question", "answer", "answer_type", "question_type", "phrase_type")
_KINDS = ("closed", "open")
_TEST_PHRASE = "test_"

Form = Literal["public", "mevf"]


@dataclass(frozen=True, kw_only=True)
class VqaRadOptions(ArchiveOptions):
    """Options of `medvlp shards build vqa-rad`."""

    form: Form | None = option(
        "public (the release) or mevf (trainset.json and testset.json); default: what is there", None
    )
    organ: list[str] = option("only images of CHEST, HEAD or ABD (repeatable)", [])
    official_split: bool = option(
        "also the train questions about images that have test questions, as published: all test images are "
        "then in train too, and shards verify refuses the dataset",
        False,
    )


@register("vqa-rad", VqaRadOptions)
def open_vqa_rad(options: VqaRadOptions, image_size: int) -> "VqaRadSource":
    """Build from VQA-RAD: images with questions; test images are seen in the test split only."""
    return VqaRadSource(options)


class VqaRadSource(ArchiveSource):
    """One image a record (with --official-split one for each split in which questions ask about it).

    All images of a case that has test questions are test images, with their test questions only. The patient
    is MedPix's case where the form names it, else the image.
    """

    name = "vqa-rad"
    facts = Facts(
        title="VQA-RAD",
        license="CC0 1.0",
        access="free",
        origin="https://osf.io/89kps/ (mevf: data_RAD of github.com/aioz-ai/MICCAI19-MedVQA)",
    )
    options: VqaRadOptions

    def prepare(self) -> None:
        """Which of its forms is there, and the numbers published of it."""
        self.label_names = []
        self._form = self.options.form or self._find_form()
        self.published = {
            "public": {"questions": 2_248, "test questions": 451},
            "mevf": {"train questions": 3_064, "test questions": 451, "images with test questions": 203},
        }[self._form]

    def records(self) -> Iterator[Record]:
        """Every image with its questions, in the order in which the files name them; bad questions first."""
        images: dict[str, _Image] = {}
        for split, item in self._items():
            problem = item.problem or _problem(item)
            if problem:
                yield Record(item.file, item.line, {}, problem=problem)
                continue
            self.found.update(["questions", f"{split} questions"])
            name = item["image_name"]
            image = images.setdefault(name, _Image(item, name))
            image.case = item["image_case_url"] or image.case
            image.questions[split].append(item)
        self.found["images with test questions"] = sum(bool(i.questions["test"]) for i in images.values())
        yield from self._split(list(images.values()))

    def identify(self, record: Record) -> Identity:
        """The split before the name makes the two records of an image differ; lists name it without."""
        image, split = record["image"], record["split"]
        return Identity(record["case"], f"{split}/{image}", image, split)

    def studies(self, record: Record) -> list[Study]:
        """The image with its questions."""
        image = record["image"]
        questions = [
            Question(row["question"], row["answer"], row["answer_type"].lower(), row["question_type"].lower())
            for row in record.joined["questions"]
        ]
        return [
            Study(
                study_id=image,
                patient_id=record["case"],
                image=self.image(f"VQA_RAD Image Folder/{image}", f"images/{image}", image),
                questions=questions,
                extra={"organ": record["organ"]},
            )
        ]

    def _find_form(self) -> Form:
        has_mevf = any(self.files.find(file, or_gzip=True) is not None for file in _MEVF.values())
        if self.files.find(_PUBLIC, or_gzip=True) is not None and has_mevf:
            raise DataError(
                f"{self.options.root} holds both {_PUBLIC} and {' or '.join(_MEVF.values())}; say which is "
                "meant: --form public or --form mevf"
            )
        return "mevf" if has_mevf else "public"

    def _items(self) -> Iterator[tuple[str, Record]]:
        """Split and item of every question."""
        files = _MEVF if self._form == "mevf" else {"": _PUBLIC}
        if self.files.find(_OTHER, or_gzip=True) is not None:
            self.texts.remarks.append(f"{_OTHER} is no part of the set and was not read")
        for split, file in files.items():
            for item in object_records(self.texts.json(file), file, _FIELDS, ["image_case_url"]):
                is_test = not item.problem and item["phrase_type"].startswith(_TEST_PHRASE)
                yield split or ("test" if is_test else "train"), item

    def _split(self, images: list["_Image"]) -> Iterator[Record]:
        """The records, and a remark on what the split leaves out."""
        test_cases = {image.case for image in images if image.questions["test"]}
        left: Counter[str] = Counter()
        for image in images:
            if self.options.organ and image.first["image_organ"] not in self.options.organ:
                left["organ"] += 1
                continue
            for split, questions in image.questions.items():
                if split == "train" and image.case in test_cases and not self.options.official_split:
                    left["questions"] += len(questions)
                elif questions:
                    yield image.record(split)
        if left["organ"]:
            self.texts.remarks.append(f"{left['organ']:,} images of other organs were left out (--organ)")
            if left["organ"] == len(images):
                raise DataError(f"--organ: the archive has no image of {', '.join(self.options.organ)}")
        if left["questions"]:
            self.texts.remarks.append(
                f"{left['questions']:,} train questions about test images were left out (--official-split)"
            )


class _Image:
    """An image and its questions by split."""

    def __init__(self, first: Record, case: str) -> None:
        self.first = first
        self.case = case
        self.questions: dict[str, list[Record]] = {"train": [], "test": []}

    def record(self, split: str) -> Record:
        """The image with its questions of a split."""
        questions = self.questions[split]
        cells = {
            "image": self.first["image_name"],
            "organ": self.first["image_organ"],
            "case": self.case,
            "split": split,
        }
        return Record(questions[0].file, questions[0].line, cells, {"questions": questions})


def _problem(item: Record) -> str:
    """What is wrong with a question, or ""."""
    for name in ("image_name", "question", "answer"):
        if not item[name]:
            return f"{name!r} is empty"
    return "" if item["answer_type"].lower() in _KINDS else "'answer_type' is neither CLOSED nor OPEN"
