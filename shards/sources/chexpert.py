"""Source: CheXpert v1.0 and v1.0-small, with the 5x200 images of zero-shot evaluation by rule and seed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b

from shards.archives.records import Record
from shards.archives.source import ArchiveOptions, ArchiveSource, Facts, Identity
from shards.archives.texts import Table
from shards.errors import DataError
from shards.sources.base import option
from shards.sources.registry import register
from shards.splits import SPLITS
from shards.study import Study

#: In the order of the file, which differs from MIMIC-CXR-JPG's and CheXbert's.
FINDINGS = (
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema",
    "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other",
    "Fracture", "Support Devices",
)  # fmt: skip
COMPETITION = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
#: Images of a class in a draw, and images of the public train.csv that qualify.
DRAWN = 200
_POOLS = dict(zip(COMPETITION, (1_087, 1_034, 537, 2_257, 2_425), strict=True))
#: Split of all images of patients who are in a draw: they are no training data.
DRAWN_SPLIT = "five_by_200"

_COLUMNS = ("Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *FINDINGS)
_TEST_COLUMNS = ("Path", *FINDINGS)


@dataclass(frozen=True, kw_only=True)
class CheXpertOptions(ArchiveOptions):
    """Options of `medvlp shards build chexpert`."""

    five_by_200: int = option(
        "draws of 5x200 training images for zero-shot evaluation, lists 5x200_0, ...; all images of their "
        f"patients make the split {DRAWN_SPLIT}",
        0,
        least=0,
        most=100,
    )


@register("chexpert", CheXpertOptions)
def open_chexpert(options: CheXpertOptions, image_size: int) -> CheXpertSource:
    """Build from CheXpert v1.0 or v1.0-small: films, 14 labels with uncertainty, the official split."""
    return CheXpertSource(options)


class CheXpertSource(ArchiveSource):
    """One image a record; images of one study share its labels and its patient."""

    name = "chexpert"
    facts = Facts(
        title="CheXpert v1.0",
        license="Stanford University Dataset Research Use Agreement",
        access="research use, by form",
        origin="https://aimi.stanford.edu/datasets/chexpert-chest-x-rays",
    )
    reading = 2
    options: CheXpertOptions

    def prepare(self) -> None:
        """The tables, and the draws of training images."""
        self.label_names = list(FINDINGS)
        self.published = {"train": 223_414, "valid": 234}
        self._tables = [self.texts.table(f"{split}.csv", columns=_COLUMNS) for split in ("train", "valid")]
        if self.files.find("test_labels.csv", or_gzip=True) is not None:  # published years after the rest
            self._tables.append(self.texts.table("test_labels.csv", columns=_TEST_COLUMNS))
            self.published["test"] = 668
        self._drawn: dict[str, list[str]] = {}
        self._patients: set[str] = set()
        if self.options.five_by_200:
            self._draw()

    def records(self) -> Iterator[Record]:
        """Every image; `drawn` names the draws it is in."""
        for split, table in zip(SPLITS, self._tables, strict=False):
            for record in table:
                if not record.problem:
                    record.cells["split"] = split
                    record.cells["path"] = image_path(record["Path"])
                yield record

    def identify(self, record: Record) -> Identity:
        """Patient and study of the path "train/patient00001/study1/view1_frontal.jpg"."""
        official, patient, study, _ = _parts(record)
        if official != record["split"]:
            raise record.error("column 'Path' is about another split")
        split = DRAWN_SPLIT if official == "train" and patient in self._patients else official
        return Identity(patient, record["path"], f"{patient}/{study}", split, official)

    def parts(self, record: Record) -> list[str]:
        """Draws that hold the image."""
        return self._drawn.get(record["path"], [])

    def list_id(self, text: str) -> str:
        """The path from the split's folder on, without the ending; a patient or study as it is."""
        path = image_path(text.strip())
        return path.rpartition(".")[0] if path.lower().endswith((".jpg", ".png")) else path

    def studies(self, record: Record) -> list[Study]:
        """The image with labels, sex and age."""
        _, patient, study, file = _parts(record)
        side = record.cells.get("AP/PA", "").upper()
        frontal = "lateral" not in file.lower()
        age = record.cells.get("Age", "")
        return [
            Study(
                study_id=f"{patient}/{study}",
                patient_id=patient,
                image=self.image(record["path"]),
                view=(side or "FRONTAL") if frontal else "LATERAL",
                labels={name: record.label(name) for name in FINDINGS},
                extra={
                    "sex": "" if (sex := record.cells.get("Sex", "")) == "Unknown" else sex,
                    # Three rows have age 0; nobody in the set is that young.
                    "age": int(age) if age.isdecimal() and int(age) else None,
                },
            )
        ]

    def _draw(self) -> None:
        pools = five_by_200_pools(self._tables[0])
        for name, pool in pools.items():
            self.published[f"5x200 {name}"] = _POOLS[name]
            self.found[f"5x200 {name}"] = len(pool)
            if len(pool) < DRAWN:
                raise DataError(
                    f"{self._tables[0].name}: {len(pool)} images of {name} alone, {DRAWN} are drawn; leave "
                    "--five-by-200 out"
                )
            for seed in range(self.options.five_by_200):
                for path in draw(pool, name, seed):
                    self._drawn.setdefault(path, []).append(f"5x200_{seed}")
                    self._patients.add(path.split("/")[1])


def five_by_200_pools(train: Table) -> dict[str, list[str]]:
    """Paths of the frontal training images of each competition class that show that class alone.

    The class is 1; the other competition classes and every other finding are 0 or blank, so that an uncertain
    one disqualifies; "No Finding" is not asked. Source: GLoRIA's rule.
    """
    pools: dict[str, list[str]] = {name: [] for name in COMPETITION}
    for record in train:
        if record.problem or record["Frontal/Lateral"] != "Frontal":
            continue
        found = [name for name in FINDINGS[1:] if record[name] not in ("", "0", "0.0")]
        if len(found) == 1 and found[0] in pools and record[found[0]] in ("1", "1.0"):
            pools[found[0]].append(image_path(record["Path"]))
    return pools


def draw(pool: list[str], name: str, seed: int, size: int = DRAWN) -> list[str]:
    """`size` images of a class: those of the smallest hash with class and seed, in any order of `pool`."""
    return sorted(pool, key=lambda path: blake2b(f"{seed} {name} {path}".encode()).digest())[:size]


def image_path(path: str) -> str:
    """A path of the tables from the split's folder on: its beginning is the name of a release's folder."""
    parts = path.replace("\\", "/").split("/")
    start = next((place for place, part in enumerate(parts) if part.lower() in SPLITS), 0)
    return "/".join(parts[start:])


def _parts(record: Record) -> tuple[str, str, str, str]:
    parts = record["path"].split("/")
    if len(parts) != 4 or not parts[1].startswith("patient"):
        raise record.error("column 'Path' is no path like train/patient00001/study1/view1_frontal.jpg")
    split, patient, study, file = parts
    return split, patient, study, file
