"""A page about a dataset for people who look at their data first: counts, prevalences, lengths, some samples.

One HTML file without scripts and without anything from elsewhere, so it opens from disk and can be mailed.
Its samples are images and report text of the dataset: it may go where the dataset may go.
"""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import jinja2
import numpy as np

from shards.errors import DataError
from shards.format import REJECTED_NAME
from shards.info import TARGETS, SplitCounts, count_split
from shards.reader import ShardReader
from shards.strict_json import JsonError, parse_json, read_limited
from shards.view import contact_sheet

#: Bars of a histogram of lengths.
_BARS = 15
#: Longest list of rejected records that is read, in bytes, and of one of its lines.
_REJECTED_LIMIT, _LINE_LIMIT = 1 << 28, 1 << 20


@dataclass(frozen=True)
class Bar:
    """One bar of a chart: what it is about, its number, its length as a share of the longest in [0, 1]."""

    name: str
    count: int
    share: float


@dataclass(frozen=True)
class Prevalence:
    """A finding in one split: samples by value, and the share of present ones among those that are known."""

    present: int
    absent: int
    uncertain: int
    unknown: int

    @property
    def share(self) -> float | None:
        """In [0, 1]; None where nothing is known."""
        known = self.present + self.absent
        return self.present / known if known else None


def dataset_page(reader: ShardReader, samples: int, seed: int = 0) -> str:
    """The page as HTML.

    Args:
        reader: of a local dataset.
        samples: how many of each split are shown; with 0 the page holds no image and no text of a report.
        seed: chooses them.

    Raises:
        DataError: a sample cannot be read.
    """
    index = reader.index
    counts = {split: count_split(reader, split) for split in index.splits}
    labels = index.label_names
    edges = _edges([words for count in counts.values() for words in count.words])
    shown = [split for split, count in counts.items() if samples and count.words]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("shards", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html.j2").render(
        index=index,
        arguments=_flat(index.arguments),
        counts=counts,
        targets=TARGETS,
        lists=sorted({name for count in counts.values() for name in count.lists}),
        prevalences={name: [_prevalence(count, name) for count in counts.values()] for name in labels},
        lengths={split: _histogram(count.words, edges) for split, count in counts.items()},
        views=_joined(count.views for count in counts.values()),
        licenses=_joined(count.licenses for count in counts.values()),
        rejected=_rejected(Path(reader.root)),
        pictures={split: _picture(reader, split, samples, seed) for split in shown},
    )


def _prevalence(count: SplitCounts, name: str) -> Prevalence:
    values = count.labels[name]
    return Prevalence(values[1], values[0], values[-1], values[None])


def _edges(lengths: Sequence[int]) -> list[int]:
    """Where the bars of a histogram begin: from 0 to the 99th percentile, equally wide."""
    width = max(int(np.percentile(lengths, 99)) // _BARS, 1) if lengths else 1
    return list(range(0, width * _BARS, width))


def _histogram(lengths: Sequence[int], edges: Sequence[int]) -> list[Bar]:
    """The last bar holds everything that is longer, too."""
    numbers = np.histogram(lengths, [*edges, np.inf])[0].tolist()
    names = [*(f"{low} to {high - 1}" for low, high in pairwise(edges)), f"{edges[-1]} or more"]
    return _bars(zip(names, numbers, strict=True))


def _joined(counters: Iterable[Counter[str]]) -> list[Bar]:
    return _bars(sum(counters, Counter[str]()).most_common())


def _bars(pairs: Iterable[tuple[str, int]]) -> list[Bar]:
    found = list(pairs)
    most = max((count for _, count in found), default=0) or 1
    return [Bar(name, count, count / most) for name, count in found]


def _rejected(root: Path) -> list[Bar]:
    """Reasons of the records that became no sample, the most frequent first."""
    path = root / REJECTED_NAME
    if not path.is_file():
        return []
    try:
        lines = read_limited(path, _REJECTED_LIMIT).splitlines()
        reasons = Counter(str(parse_json(line, _LINE_LIMIT)["reason"]) for line in lines)
    except (JsonError, KeyError, TypeError) as error:
        reason = str(error) if isinstance(error, JsonError) else "a line is no rejected record"
        raise DataError(f"{path} is damaged: {reason}") from error
    return _bars(reasons.most_common())


def _flat(value: object, name: str = "") -> list[tuple[str, str]]:
    """The build's arguments as lines "source.name", "table"."""
    if isinstance(value, dict):
        return [line for key, part in value.items() for line in _flat(part, f"{name}.{key}".lstrip("."))]
    return [(name, ", ".join(map(str, value)) if isinstance(value, list) else str(value))]


def _picture(reader: ShardReader, split: str, samples: int, seed: int) -> str:
    """A contact sheet as a data URI."""
    file = io.BytesIO()
    contact_sheet(reader, split, samples, 4, seed).save(file, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
