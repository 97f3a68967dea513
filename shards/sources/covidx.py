"""Source: COVIDx, the lists of COVID-Net over films of several archives."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shards.archives.records import Record
from shards.archives.source import ArchiveOptions, ArchiveSource, Facts, Identity
from shards.errors import DataError, UsageError, nearest
from shards.sources.base import option
from shards.sources.registry import register
from shards.study import LabelValue, Study

_NORMAL, _PNEUMONIA, _COVID, _SEVERE = "Normal", "Pneumonia", "COVID-19", "Severity level 2"
#: Classes as the lists write them, in the order of the published numbers -> labels of a film of that class.
_THREE: dict[str, dict[str, LabelValue]] = {
    "normal": {_NORMAL: 1, _PNEUMONIA: 0, _COVID: 0},
    "pneumonia": {_NORMAL: 0, _PNEUMONIA: 1, _COVID: 0},
    "COVID-19": {_NORMAL: 0, _PNEUMONIA: 0, _COVID: 1},
}
_TWO: dict[str, dict[str, LabelValue]] = {"negative": {_COVID: 0}, "positive": {_COVID: 1}}
_LEVELS: dict[str, dict[str, LabelValue]] = {"level1": {_SEVERE: 0}, "level2": {_SEVERE: 1}}


@dataclass(frozen=True)
class Release:
    """A release of the lists.

    Attributes:
        lists: split -> names under which its list was published.
        classes: as the lists write them -> labels.
        sizes: split -> published number of films, by class in the order of `classes` where it is known.
    """

    lists: dict[str, tuple[str, ...]]
    classes: dict[str, dict[str, LabelValue]]
    sizes: dict[str, tuple[int, ...]]


def _listed(
    name: str, classes: dict[str, dict[str, LabelValue]], train: tuple[int, ...], test: tuple[int, ...]
) -> Release:
    plain = ("",) if name == "1" else ()  # the first lists had no number at first
    names = {
        split: tuple(f"{split}_COVIDx{number}.txt" for number in (*plain, name))
        for split in ("train", "test")
    }
    return Release(names, classes, {"train": train, "test": test})


RELEASES = {
    "1": _listed("1", _THREE, (7_966, 8_514, 66), (100, 100, 10)),
    "2": _listed("2", _THREE, (7_966, 5_451, 152), (100, 100, 31)),
    "3": _listed("3", _THREE, (7_966, 5_451, 253), (100, 100, 100)),
    "4": _listed("4", _THREE, (7_966, 5_459, 473), (100, 100, 100)),
    "5": _listed("5", _THREE, (7_966, 5_475, 517), (100, 100, 100)),
    "6": _listed("6", _TWO, (13_794, 517), (100, 100)),
    "7A": _listed("7A", _THREE, (7_966, 5_475, 1_670), (100, 100, 100)),
    "7B": _listed("7B", _TWO, (13_794, 1_670), (100, 100)),
    "8A": _listed("8A", _THREE, (7_966, 5_475, 2_158), (100, 100, 200)),
    "8B": _listed("8B", _TWO, (13_794, 2_158), (200, 200)),
    "9A": _listed("9A", _THREE, (8_085, 5_555, 16_490), (100, 100, 200)),
    "9B": _listed("9B", _TWO, (13_992, 16_490), (200, 200)),
    "Sev": _listed("Sev", _LEVELS, (175, 584), (52, 98)),
    "CXR-2": Release(
        {"train": ("train.txt",), "test": ("test.txt",)},
        _TWO,
        {"train": (13_992, 15_994), "test": (200, 200)},
    ),
    "CXR-4": Release(
        {"train": ("train.txt",), "valid": ("val.txt",), "test": ("test.txt",)},
        _TWO,
        {"train": (67_863,), "valid": (8_473,), "test": (8_482,)},
    ),
}
#: Films of Kaggle's COVIDx CXR-2, version 6, that list 9A names ("COVIDx v6" of MGCA).
_IN_CXR2 = 29_986
_FOLDERS = {"train": "train", "valid": "val", "test": "test"}
_TYPING_ERRORS = {"rnsa": "rsna"}
_WORD = re.compile(r"\S+")


@dataclass(frozen=True, kw_only=True)
class CovidxOptions(ArchiveOptions):
    """Options of `medvlp shards build covidx`."""

    release: str | None = option(
        f"of the lists: {', '.join(RELEASES)}; default: that whose lists are there", None
    )
    lists: Path | None = option("folder of the lists, where they do not lie in --root", None)
    only_present: bool = option(
        "leave out films that are not there, as for list 9A over Kaggle's CXR-2", False
    )


@register("covidx", CovidxOptions)
def open_covidx(options: CovidxOptions, image_size: int) -> CovidxSource:
    """Build from COVIDx 1 to 9B, Sev, CXR-2 or CXR-4: films and their class, the official split."""
    return CovidxSource(options)


class CovidxSource(ArchiveSource):
    """One film a record, of the class that its list says."""

    name = "covidx"
    facts = Facts(
        title="COVIDx",
        license="terms of each film's own source (extra.origin); lists AGPL-3.0",
        access="free, after the registrations that the sources ask for",
        origin="https://github.com/lindawangg/COVID-Net (docs/COVIDx.md) or Kaggle's andyczhao/covidx-cxr2",
    )
    options: CovidxOptions

    def prepare(self) -> None:
        """Which release, its labels and published numbers."""
        folder = self.options.lists
        self._list_files = self.texts if folder is None else self.open(folder)
        self._release_name = self.options.release or self._found_release()
        if self._release_name not in RELEASES:
            raise UsageError(f"no release {self._release_name!r}{nearest(self._release_name, RELEASES)}")
        self._release = release = RELEASES[self._release_name]
        self.label_names = list(dict.fromkeys(name for labels in release.classes.values() for name in labels))
        partial = self.options.only_present and self._release_name == "9A"
        for split, sizes in release.sizes.items():
            self.published[split] = _IN_CXR2 if partial and split == "train" else sum(sizes)
            if len(sizes) == len(release.classes) and not (partial and split == "train"):
                self.published |= {
                    f"{split} {name}": n for name, n in zip(release.classes, sizes, strict=True)
                }
        self._told: list[str] = []
        self._absent = 0

    def records(self) -> Iterator[Record]:
        """Every line of every list."""
        last = {record["patient"]: record["split"] for record in self._lines() if not record.problem}
        sources = _Sources()
        for record in self._lines():
            if record.problem:
                yield record
            elif self.options.only_present and not self._is_film(record["name"], record["split"]):
                self._absent += 1
            else:
                split = record["split"]
                self.found[f"{split} {record['class']}"] += 1
                sources.add(record)
                if (other := last[record["patient"]]) != split:
                    self.found[split] += 1  # it is as published, though it is not used
                    yield Record(
                        record.file, record.line, {}, problem=f"its patient is in the {other} list too"
                    )
                else:
                    yield record
        self._told += sources.remarks()
        if self._absent:
            self._told.append(f"{self._absent:,} listed films are not there and were left out")

    def identify(self, record: Record) -> Identity:
        """A patient is called the same in all lists."""
        return Identity(record["patient"], record["name"], record["name"], record["split"])

    def list_id(self, text: str) -> str:
        """Without folders but with its ending: some names of films differ in nothing else."""
        return text.strip().replace("\\", "/").rpartition("/")[2]

    def studies(self, record: Record) -> list[Study]:
        """The film with its class and the archive that it comes from."""
        return [
            Study(
                study_id=record["name"],
                patient_id=record["patient"],
                image=self.image(_path(record["name"], record["split"])),
                labels=dict(self._release.classes[record["class"]]),
                extra={"origin": record["source"], "release": self._release_name},
            )
        ]

    def remarks(self) -> list[str]:
        """As the base has it, and what a user of the lists should know."""
        return super().remarks() + self._told

    def _is_film(self, name: str, split: str) -> bool:
        return self.files.find(_path(name, split)) is not None

    def _found_release(self) -> str:
        there = []
        for name, release in RELEASES.items():
            files = [file for names in release.lists.values() for file in names]
            plain = name in ("CXR-2", "CXR-4")  # their lists have the same names
            if plain and (self._list_files.files.find("val.txt", or_gzip=True) is not None) != (
                name == "CXR-4"
            ):
                continue
            if any(self._list_files.files.find(file, or_gzip=True) is not None for file in files):
                there.append(name)
        if not there:
            raise DataError(
                f"{self._list_files.files.root} has no train_COVIDx9A.txt, no list of another release and no "
                f"train.txt; get it from {self.facts.origin}"
            )
        if len(there) > 1:
            raise DataError(f"lists of the releases {', '.join(there)} are there; name one with --release")
        return there[0]

    def _lines(self) -> Iterator[Record]:
        """The lists one after the other, train first."""
        for split, names in self._release.lists.items():
            file = self._list_files.files.get(*names).name
            for number, text in self._list_files.lines(*names):
                yield self._parsed(file, number, text, split)

    def _parsed(self, file: str, number: int, text: str, split: str) -> Record:
        """The parts of "patient filename class source"; the source may be missing.

        Patient and name may hold blanks ("COVID 12 COVID(12).png"): the film that is there tells where its
        name begins.
        """
        words = list(_WORD.finditer(text))
        known = {name.lower(): name for name in self._release.classes}
        places = [i for i, word in enumerate(words) if i >= 2 and word.group().lower() in known]
        if not places or len(words) - places[-1] > 2:
            wanted = ", ".join(known.values())
            reason = f"not of the form 'patient filename class source' with a class of {wanted}"
            return Record(file, number, {}, problem=reason)
        place = places[-1]
        end, begin = words[place - 1].end(), place - 1
        if place > 2:
            starts = [words[i].start() for i in range(1, place)]
            there = [i for i, start in enumerate(starts, 1) if self._is_film(text[start:end], split)]
            if len(there) > 1:
                return Record(file, number, {}, problem="two films fit the words before the class")
            begin = there[0] if there else begin
        source = words[-1].group().lower() if place < len(words) - 1 else ""
        cells = {
            "patient": text[words[0].start() : words[begin - 1].end()],
            "name": text[words[begin].start() : end],
            "class": known[words[place].group().lower()],
            "source": _TYPING_ERRORS.get(source, source),
            "split": split,
        }
        return Record(file, number, cells)


class _Sources:
    """Which classes of films each source has."""

    def __init__(self) -> None:
        self._classes: dict[str, set[str]] = {}
        self._films: Counter[str] = Counter()

    def add(self, record: Record) -> None:
        """Take in a film."""
        if source := record["source"]:
            self._classes.setdefault(source, set()).add(record["class"])
            self._films[source] += 1

    def remarks(self) -> list[str]:
        """A line where the source of a film tells its class."""
        telling = sum(n for source, n in self._films.items() if len(self._classes[source]) == 1)
        if not telling:
            return []
        return [
            f"{telling:,} films come from sources whose films are all of one class: a model may tell sources "
            "apart, not findings; compare it with the pixel baseline of `medvlp evaluate`"
        ]


def _path(name: str, split: str) -> str:
    return f"{_FOLDERS[split]}/{name}"
