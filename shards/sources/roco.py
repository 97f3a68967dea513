"""Source: ROCO v1, images of articles with their captions."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from shards.archives.records import Record
from shards.archives.source import ArchiveOptions, ArchiveSource, Facts, Identity
from shards.archives.texts import ArchiveTexts
from shards.sources.base import option
from shards.sources.registry import register
from shards.study import Study

#: Folder of the release -> split, with the number of its radiology images.
_FOLDERS = {"train": ("train", 65_448), "validation": ("valid", 8_180), "test": ("test", 8_179)}
_ARTICLE = re.compile(r"(PMC\d+)_.+")
_NO_LICENCE = "NO-CC CODE"


@dataclass(frozen=True, kw_only=True)
class RocoOptions(ArchiveOptions):
    """Options of `medvlp shards build roco`."""

    official_split: bool = option(
        "the published split, in which 66 % of the valid and test images come from articles of the training "
        "images; else all images of an article share a split",
        False,
    )


@register("roco", RocoOptions)
def open_roco(options: RocoOptions, image_size: int) -> "RocoSource":
    """Build from ROCO v1: radiology images of articles with captions, split by article."""
    return RocoSource(options)


class RocoSource(ArchiveSource):
    """One image a record; its patient is the article, since nothing else is known of whose it is."""

    name = "roco"
    facts = Facts(
        title="ROCO v1",
        license="of the article, see licences.txt",
        access="free",
        origin="https://github.com/razorx89/roco-dataset (its scripts/fetch.py gets the images)",
    )
    options: RocoOptions
    reading = 2
    identifying = ("article",)

    def prepare(self) -> None:
        """Published numbers; there are no labels."""
        self.label_names = []
        self.published = {"all": sum(count for _, count in _FOLDERS.values())}
        self.published |= {f"official {split}": count for split, count in _FOLDERS.values()}

    def records(self) -> Iterator[Record]:
        """Every image that has a licence, with its caption."""
        for folder, (split, _) in _FOLDERS.items():
            captions = _Captions(self.texts, folder)
            join = self.join()
            join.add("captions", captions, key="id", unique=True)
            licences = self.texts.table(
                *_paths(folder, "licences.txt"), kind=".csv", columns=["ROCO_ID", "PMC_ID", "CC"]
            )
            for record in join.records(licences, captions="ROCO_ID"):
                if not record.problem:
                    self.found[f"official {split}"] += 1
                    record.cells["folder"] = folder
                yield record

    def identify(self, record: Record) -> Identity:
        """Its article is the beginning of the image's name there."""
        article = _ARTICLE.fullmatch(record["PMC_ID"])
        if article is None:
            raise record.error("column 'PMC_ID' is no name like PMC1234567_figure.jpg")
        split, _ = _FOLDERS[record["folder"]]
        image = record.text("ROCO_ID")
        return Identity(article[1], image, image, split if self.options.official_split else None)

    def studies(self, record: Record) -> list[Study]:
        """The image with its caption as findings."""
        if not record.joined["captions"]:
            raise record.error("the image has no line in captions.txt")
        article = record["PMC_ID"].partition("_")[0]
        licence = record["CC"]
        # fetch.py keeps the name of the article's figure; mirrors number them.
        names = (f"{record['ROCO_ID']}.jpg", record["PMC_ID"])
        paths = [path for name in names for path in _paths(record["folder"], f"images/{name}")]
        return [
            Study(
                study_id=record["ROCO_ID"],
                patient_id=article,
                image=self.image(*paths),
                sections={"findings": record.joined["captions"][0]["caption"]},
                license="" if licence == _NO_LICENCE else licence,
                extra={"article": article, "official_split": _FOLDERS[record["folder"]][0]},
            )
        ]


class _Captions:
    """Captions of a folder, each a line of id, tab, caption; other lines are counted and left out."""

    def __init__(self, texts: ArchiveTexts, folder: str) -> None:
        self._texts = texts
        self._folder = folder
        self.name = f"{folder}/captions.txt"

    def __iter__(self) -> Iterator[Record]:
        others = 0
        for line, text in self._texts.lines(*_paths(self._folder, "captions.txt"), ended=True):
            image, _, caption = (part.strip() for part in text.partition("\t"))
            if image and caption:
                yield Record(self.name, line, {"id": image, "caption": caption})
            else:
                others += 1
        if others:
            self._texts.remarks.append(f"{self.name}: {others:,} lines are not an id, a tab and a caption")

    def again(self) -> str:
        """What to do about a damaged file."""
        return f"get the file again from {self._texts.files.origin}"


def _paths(folder: str, file: str) -> tuple[str, str]:
    """Where a file of the release may lie: in the repository's folder `data`, or in that folder as root."""
    return f"data/{folder}/radiology/{file}", f"{folder}/radiology/{file}"
