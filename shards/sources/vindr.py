"""Source: VinDr-CXR from PhysioNet or Kaggle (VinBigData), 18,000 films read by several radiologists each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from shards.archives.records import Record
from shards.archives.source import ArchiveOptions, ArchiveSource, Facts, Identity
from shards.archives.texts import Table
from shards.dicom import read_dicom
from shards.dicom_windows import Window
from shards.errors import DataError
from shards.sources.base import option
from shards.sources.registry import register
from shards.study import Box, LabelValue, Study

LOCAL = (
    "Aortic enlargement", "Atelectasis", "Calcification", "Cardiomegaly", "Clavicle fracture",
    "Consolidation", "Edema", "Emphysema", "Enlarged PA", "ILD", "Infiltration", "Lung Opacity",
    "Lung cavity", "Lung cyst", "Mediastinal shift", "Nodule/Mass", "Pleural effusion", "Pleural thickening",
    "Pneumothorax", "Pulmonary fibrosis", "Rib fracture", "Other lesion",
)  # fmt: skip
NORMAL = "No finding"
#: Written "Other disease" in one of the two label files and "Other diseases" in the other.
_OTHER = ("Other diseases", "Other disease")
GLOBAL = ("COPD", "Lung tumor", "Pneumonia", "Tuberculosis", _OTHER[0], NORMAL)
#: Kaggle's, each at its class_id.
KAGGLE = (
    "Aortic enlargement", "Atelectasis", "Calcification", "Cardiomegaly", "Consolidation", "ILD",
    "Infiltration", "Lung Opacity", "Nodule/Mass", "Other lesion", "Pleural effusion", "Pleural thickening",
    "Pneumothorax", "Pulmonary fibrosis", NORMAL,
)  # fmt: skip
_KAGGLE_LICENSE = "Kaggle competition rules of VinBigData Chest X-ray Abnormalities Detection"
_CORNERS = ("x_min", "y_min", "x_max", "y_max")
_READERS, _MAJORITY = 3, 2
#: Boxes of two readers are about the same thing from this overlap on (intersection over union).
_OVERLAP = 0.5


@dataclass(frozen=True, kw_only=True)
class VindrOptions(ArchiveOptions):
    """Options of `medvlp shards build vindr`."""

    window: Window = option("DICOM values to grey levels", "auto")
    boxes: Literal["readers", "fused"] = option(
        "readers: every reader's own; fused: the mean box of those that two readers or more drew", "readers"
    )


@register("vindr", VindrOptions)
def open_vindr(options: VindrOptions, image_size: int) -> VindrSource:
    """Build from VinDr-CXR (PhysioNet's or Kaggle's files): films, majority labels, boxes by reader."""
    return VindrSource(options)


class VindrSource(ArchiveSource):
    """One film a record. A finding is 1 where two of three readers name it; test films have a consensus."""

    name = "vindr"
    facts = Facts(
        title="VinDr-CXR",
        license="PhysioNet Credentialed Health Data License 1.5.0",
        access="credentialed at PhysioNet, after registration at Kaggle",
        origin="https://physionet.org/content/vindr-cxr/ or "
        "https://www.kaggle.com/c/vinbigdata-chest-xray-abnormalities-detection/data",
    )
    options: VindrOptions
    reading = 3

    def prepare(self) -> None:
        """Whose files these are, with their labels and published numbers."""
        names = ("annotations_train.csv", "image_labels_train.csv", "image_labels_test.csv")
        self._kaggle = not any(
            self.files.find(path, or_gzip=True) for name in names for path in (f"annotations/{name}", name)
        )
        if not self._kaggle:
            self.label_names = [*LOCAL, *GLOBAL]
            self.published = {"train": 15_000, "test": 3_000, "train label rows": 45_000}
        elif self.files.find("train.csv", or_gzip=True) is not None:
            self.label_names = list(KAGGLE)
            self.published = {"all": 15_000, "rows": 67_914, "boxes": 36_096}
        else:
            raise DataError(
                f"{self.options.root} has neither PhysioNet's annotations/image_labels_train.csv nor "
                f"Kaggle's train.csv; get it from {self.facts.origin}"
            )

    def records(self) -> Iterator[Record]:
        """Every film, with its rows of labels and boxes."""
        if self._kaggle:
            rows = self.texts.table(
                "train.csv", columns=["image_id", "class_name", "class_id", "rad_id", *_CORNERS]
            )
            yield from self._films(rows, rows, "")
            return
        for split in ("train", "test"):
            reader = ["rad_id"] if split == "train" else []
            labels = self._physionet(
                f"image_labels_{split}.csv",
                ["image_id", *reader, *(name for name in self.label_names if name not in _OTHER)],
                optional=_OTHER,
            )
            if len(labels.absent) != 1:
                raise DataError(
                    f"{labels.name} has not one column of {' and '.join(_OTHER)}; {labels.again()}"
                )
            boxes = self._physionet(
                f"annotations_{split}.csv", ["image_id", *reader, "class_name", *_CORNERS]
            )
            yield from self._films(labels, boxes, split)

    def identify(self, record: Record) -> Identity:
        """Nothing is known of patients: each film counts as one."""
        image = record["image_id"]
        return Identity(image, image, image, record["split"] or None)

    def studies(self, record: Record) -> list[Study]:
        """The film with labels, votes and boxes."""
        image, split = record["image_id"], record["split"]
        votes, readers = (_kaggle_votes if self._kaggle else _physionet_votes)(record, self.label_names)
        if split == "test":
            labels: dict[str, LabelValue] = {name: votes[name] for name in self.label_names}
            extra = {}
        else:
            if len(readers) != _READERS:
                raise record.error(f"{len(readers)} readers, where every film has {_READERS}")
            labels = {name: int(votes[name] >= _MAJORITY) for name in self.label_names}
            extra = {"readers": readers, "votes": {name: n for name, n in votes.items() if n}}
        boxes = [box for row in record.joined["boxes"] if (box := _box(row, self.label_names)) is not None]
        if self.options.boxes == "fused" and split != "test":
            boxes = fuse(boxes)
        film = read_dicom(
            self.files.read(f"{split or 'train'}/{image}.dicom"), self.options.window, turn=False
        )
        self.notes.update(film.notes)
        return [
            Study(
                study_id=image,
                patient_id=image,
                image=film.pixels,
                view=film.view or "PA",  # all films are, by the publication
                labels=labels,
                boxes=[_scaled(box, *film.scale) for box in boxes],
                license=_KAGGLE_LICENSE if self._kaggle else "",
                extra=extra,
            )
        ]

    def remarks(self) -> list[str]:
        """As the base has it, and that patients are not known."""
        line = "each film counts as a patient of its own, so a patient may be in two splits: none is named"
        return [*super().remarks(), line]

    def _physionet(self, name: str, columns: list[str], optional: Sequence[str] = ()) -> Table:
        return self.texts.table(f"annotations/{name}", name, columns=columns, optional=optional)

    def _films(self, labels: Table, boxes: Table, split: str) -> Iterator[Record]:
        """A record for each film that `labels` has rows of."""
        join = self.join()
        join.add("labels", labels, key="image_id")
        join.add("boxes", boxes, key="image_id")
        seen: set[str] = set()
        for record in join.records(labels, labels="image_id", boxes="image_id"):
            self.found[f"{split} label rows" if split else "rows"] += 1
            if record["image_id"] in seen:
                continue
            seen.add(record["image_id"])
            record.cells["split"] = split
            self.found["boxes"] += sum(bool(row["x_min"]) for row in record.joined["boxes"])
            yield record


Votes = tuple[Counter[str], list[str]]


def _physionet_votes(record: Record, names: Sequence[str]) -> Votes:
    """Readers for each finding, and the readers; a row is what one reader said of all findings."""
    rows = record.joined["labels"]
    readers = sorted({row.cells.get("rad_id", "") for row in rows})
    if len(readers) < len(rows) or ("" in readers and "rad_id" in record.cells):
        raise record.error("a reader has two rows of the film, or a row no reader")
    votes: Counter[str] = Counter()
    for row in rows:
        for name in names:
            cell = row[name] if name != _OTHER[0] else row[_OTHER[0]] or row[_OTHER[1]]
            if cell not in ("0", "1", "0.0", "1.0"):
                raise row.error(f"column {name!r} holds neither 1 nor 0")
            votes[name] += cell in ("1", "1.0")
    return votes, readers


def _kaggle_votes(record: Record, names: Sequence[str]) -> Votes:
    """Readers for each class, and the readers; a row is one box of a reader, or that he found nothing."""
    said: set[tuple[str, str]] = set()
    for row in record.joined["labels"]:
        number = row["class_id"]
        if not number.isdecimal() or int(number) >= len(names) or row["class_name"] != names[int(number)]:
            raise row.error("columns 'class_id' and 'class_name' are not of one of the 15 classes")
        said.add((row["class_name"], row.text("rad_id")))
    return Counter(name for name, _ in said), sorted({reader for _, reader in said})


def _box(row: Record, names: Sequence[str]) -> Box | None:
    """The box of a row; None where it has none, as rows of global labels and of normal films."""
    name = row["class_name"]
    name = _OTHER[0] if name in _OTHER else name
    if name not in names:
        raise row.error("column 'class_name' holds none of the findings")
    boxed = any(row[side] for side in _CORNERS)
    if boxed != (name in LOCAL):
        raise row.error("a finding with a place has no box, or one without has a box")
    if not boxed:
        return None
    left, top, right, bottom = (row.number(side) for side in _CORNERS)
    if right < left or bottom < top:
        raise row.error("columns 'x_max' and 'y_max' lie before 'x_min' and 'y_min'")
    return Box(name, left, top, right - left, bottom - top, reader=row.cells.get("rad_id", ""))


def fuse(boxes: Sequence[Box]) -> list[Box]:
    """The mean box of each cluster of boxes of one finding that two readers or more drew.

    A box joins the cluster whose mean it overlaps most, by `_OVERLAP` at least, in the order of the table.
    Source: weighted box fusion with equal weights.
    """
    clusters: list[list[Box]] = []
    for box in boxes:
        mine = [cluster for cluster in clusters if cluster[0].label == box.label]
        best = max(mine, key=lambda cluster: _overlap(_mean(cluster), box), default=None)
        if best is not None and _overlap(_mean(best), box) >= _OVERLAP:
            best.append(box)
        else:
            clusters.append([box])
    return [_mean(cluster) for cluster in clusters if len({box.reader for box in cluster}) >= _MAJORITY]


def _mean(boxes: Sequence[Box]) -> Box:
    sides = zip(*((box.x, box.y, box.width, box.height) for box in boxes), strict=True)
    x, y, width, height = (sum(side) / len(boxes) for side in sides)
    return Box(boxes[0].label, x, y, width, height)


def _scaled(box: Box, across: float, down: float) -> Box:
    """A box in pixels of the film as it is stored, which are square."""
    return replace(box, x=box.x * across, y=box.y * down, width=box.width * across, height=box.height * down)


def _overlap(one: Box, other: Box) -> float:
    """Intersection over union."""
    width = min(one.x + one.width, other.x + other.width) - max(one.x, other.x)
    height = min(one.y + one.height, other.y + other.height) - max(one.y, other.y)
    common = max(0.0, width) * max(0.0, height)
    union = one.width * one.height + other.width * other.height - common
    return common / union if union > 0 else 0.0
