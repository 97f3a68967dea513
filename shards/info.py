"""Counts of a dataset for people: splits, labels, views and text lengths."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from shards.reader import ShardReader
from shards.tokenizer import MIN_PATIENTS, count_words, load_tokenizer

#: How many of the rarest words are shown.
RAREST = 10
_TRAIN = "train"
#: Field of the metadata that is counted -> what people call it.
TARGETS = {
    "boxes": "boxes", "masks": "masks", "anatomy": "boxes of anatomy", "phrases": "phrases",
    "questions": "questions",
}  # fmt: skip


@dataclass(frozen=True)
class SplitCounts:
    """What the metadata of one split hold.

    Attributes:
        words: number of words of each report; `sentences` likewise.
        views: view -> samples.
        labels: finding -> value (1, 0, -1, None) -> samples.
        targets: field of the metadata that holds boxes, masks and the like -> how many.
        lists: list -> samples that stand in it.
        licenses: licence -> samples.
    """

    words: list[int]
    sentences: list[int]
    views: Counter[str]
    labels: dict[str, Counter[int | None]]
    targets: Counter[str]
    lists: Counter[str]
    licenses: Counter[str]


def count_split(reader: ShardReader, split: str) -> SplitCounts:
    """Read the metadata of every sample of `split` and count."""
    label_names = reader.index.label_names
    labels: dict[str, Counter[int | None]] = {name: Counter() for name in label_names}
    counts = SplitCounts([], [], Counter(), labels, Counter(), Counter(), Counter())
    for i in range(reader.sample_count(split)):
        metadata = reader.metadata(split, i)
        counts.words.append(sum(len(sentence.split()) for sentence in metadata["sentences"]))
        counts.sentences.append(len(metadata["sentences"]))
        counts.views[metadata["view"] or "unknown"] += 1
        if reader.index.version == 1:  # whose metadata do not name the masks
            metadata["masks"] = list(reader.masks(split, i))
        counts.targets.update({name: len(metadata[name]) for name in TARGETS})
        counts.lists.update(metadata["lists"])
        counts.licenses[metadata["license"] or "not stated"] += 1
        for name in label_names:
            counts.labels[name][metadata["labels"].get(name)] += 1
    return counts


def describe(reader: ShardReader) -> Group:
    """Tables of a whole dataset, ready for a rich console."""
    counts = {split: count_split(reader, split) for split in reader.index.splits}
    tables = [_split_table(reader, counts), _text_table(counts), _target_table(reader, counts)]
    if reader.index.label_names:
        tables.append(_label_table(counts, reader.index.label_names))
    if reader.index.tokenizer is not None and _TRAIN in reader.index.splits:
        tables.append(_vocabulary_table(reader))
    return Group(*tables)


def _split_table(reader: ShardReader, counts: dict[str, SplitCounts]) -> Table:
    index = reader.index
    title = f"{escape(index.name)}: {index.image_size} px, {index.fingerprint}"
    table = Table(title=title, title_justify="left")
    table.add_column("split")
    for heading in ("samples", "studies", "patients", "shards", "MB"):
        table.add_column(heading, justify="right")
    table.add_column("views")
    table.add_column("licences")
    for split, totals in index.splits.items():
        views = ", ".join(f"{view} {count}" for view, count in counts[split].views.most_common())
        numbers = (totals.samples, totals.studies, totals.patients, totals.shards)
        megabytes = f"{totals.bytes / 1e6:,.1f}"
        licenses = ", ".join(f"{name} {count}" for name, count in counts[split].licenses.most_common())
        table.add_row(split, *(f"{n:,}" for n in numbers), megabytes, escape(views), escape(licenses))
    return table


def _target_table(reader: ShardReader, counts: dict[str, SplitCounts]) -> Table:
    """How many boxes, masks, phrases and questions there are, and samples in each list."""
    caption = (
        "format version 1: masks lack what another finding overlaps; anatomy, phrases, questions and lists "
        "are not stored"
    )
    table = Table(
        title="targets, and samples of each list",
        title_justify="left",
        caption=caption if reader.index.version == 1 else None,
        caption_justify="left",
    )
    table.add_column("target")
    for split in counts:
        table.add_column(split, justify="right")
    for name, heading in TARGETS.items():
        table.add_row(heading, *(f"{count.targets[name]:,}" for count in counts.values()))
    for name in sorted({name for count in counts.values() for name in count.lists}):
        table.add_row(f"list {name}", *(f"{count.lists[name]:,}" for count in counts.values()))
    return table


def _text_table(counts: dict[str, SplitCounts]) -> Table:
    table = Table(title="report length: median (5th to 95th percentile)", title_justify="left")
    table.add_column("split")
    for heading in ("words", "sentences", "without text"):
        table.add_column(heading, justify="right")
    for split, count in counts.items():
        table.add_row(split, _spread(count.words), _spread(count.sentences), f"{count.words.count(0):,}")
    return table


def _label_table(counts: dict[str, SplitCounts], label_names: list[str]) -> Table:
    table = Table(title="labels: present / absent / uncertain / not mentioned", title_justify="left")
    table.add_column("finding")
    for split in counts:
        table.add_column(split, justify="right")
    for name in label_names:
        cells = []
        for count in counts.values():
            values = count.labels[name]
            cells.append(" / ".join(f"{values[value]:,}" for value in (1, 0, -1, None)))
        table.add_row(escape(name), *cells)
    return table


def _vocabulary_table(reader: ShardReader) -> Table:
    """The words of the vocabulary that the fewest training patients share; of very few only counted.

    A word is what stands in the vocabulary whole, longer than a character; pieces may be part of many words.
    """
    counts = count_words(_train_reports(reader), limit=10 * MIN_PATIENTS)
    vocabulary = load_tokenizer(str(reader.root)).get_vocab()
    whole = {word: n for word, n in counts.holders.items() if len(word) > 1 and word in vocabulary}
    held = sorted((n, word) for word, n in whole.items())
    rare = [n for n, _ in held if n < MIN_PATIENTS]
    table = Table(
        title=f"vocabulary of {len(vocabulary):,} pieces, {len(held):,} of them words of the train split",
        title_justify="left",
        caption=f"{len(rare):,} words of fewer than {MIN_PATIENTS} patients are not shown"
        + (f"; the rarest has {rare[0]}" if rare else ""),
        caption_justify="left",
    )
    table.add_column("rarest words")
    table.add_column("patients", justify="right")
    for n, word in held[len(rare) : len(rare) + RAREST]:
        table.add_row(escape(word), f"{n:,}" + (" or more" if n == 10 * MIN_PATIENTS else ""))
    return table


def _train_reports(reader: ShardReader) -> Iterator[tuple[str, str]]:
    for i in range(reader.sample_count(_TRAIN)):
        metadata = reader.metadata(_TRAIN, i)
        yield metadata["patient_id"], " ".join(metadata["sentences"])


def _spread(values: Sequence[int]) -> str:
    if len(values) < 2:
        return ", ".join(map(str, values))
    cuts = statistics.quantiles(values, n=20, method="inclusive")
    return f"{statistics.median(values):.0f} ({cuts[0]:.0f} to {cuts[-1]:.0f})"
