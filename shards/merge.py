"""Completes a dataset whose shards are built: rejected records, tokenizer, totals and, last, the index."""

import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shards.atomic import atomic_write, remove_leftovers
from shards.build_state import STATE_FOLDER, BuildPlan, Rejection, ShardState
from shards.errors import DataError
from shards.format import (
    INDEX_NAME,
    METADATA_EXTENSION,
    REJECTED_NAME,
    TOKENIZER_NAME,
    Index,
    Shard,
    SplitTotals,
    fingerprint,
    hash_bytes,
)
from shards.reader import scan_shard
from shards.sources.base import PublishedCount
from shards.study import LabelValue
from shards.tokenizer import count_words, load_tokenizer, tokenizer_bytes, train_wordpiece

_TRAIN = "train"


@dataclass(frozen=True)
class Vocabulary:
    """What a trained vocabulary was made from.

    Attributes:
        size: number of its pieces.
        patients: whose reports were read; `min_patients` of them must share a word.
        words, left_out: number of words that took part, and of those that too few patients share.
    """

    size: int
    patients: int
    min_patients: int
    words: int
    left_out: int


@dataclass(frozen=True)
class BuildSummary:
    """Counts at the end of a build.

    Attributes:
        records: records in the source.
        rejected: reason -> number of records rejected for it.
        splits: totals of each split.
        leaking_patients: patients that are in more than one split.
        first_lines: reason -> line of the source's file in which the first such record begins.
        labels: finding -> samples by value: 1, 0, -1 uncertain, None unknown.
        remarks: lines about the source and about what was done to load it.
        vocabulary: of the tokenizer; None where none was trained.
        published_counts: numbers that are published of the source, beside those found.
    """

    records: int
    rejected: dict[str, int]
    splits: dict[str, SplitTotals]
    leaking_patients: int
    first_lines: dict[str, int] = field(default_factory=dict)
    labels: dict[str, Counter[LabelValue]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    vocabulary: Vocabulary | None = None
    published_counts: list[PublishedCount] = field(default_factory=list)

    @property
    def rejected_share(self) -> float:
        """Share of the records that were rejected, in [0, 1]."""
        return sum(self.rejected.values()) / max(self.records, 1)


def merge(out: Path) -> BuildSummary:
    """Write everything that stands beside the shards, and remove the build's own records.

    Raises:
        DataError: shards are missing, no record was accepted, or a file cannot be written.
    """
    plan = BuildPlan.load(out)
    states = _all_states(out, plan)
    for name in (REJECTED_NAME, TOKENIZER_NAME, INDEX_NAME):
        remove_leftovers(out, name)
    rejections = sorted(
        (rejection for state in states for rejection in state.rejected), key=lambda entry: entry.record
    )
    atomic_write(out / REJECTED_NAME, _rejected_lines(rejections, plan.source))
    shards = [state.shard for state in states if state.shard is not None]
    if not shards:
        raise DataError(
            f"none of the {plan.records} records could be used{_most_frequent(rejections)}; "
            f"{out / REJECTED_NAME} has the reasons"
        )
    tokenizer, vocabulary = _write_tokenizer(out, plan, shards)
    labels: dict[str, Counter[LabelValue]] = {name: Counter() for name in plan.label_names}
    splits, leaking = _totals(out, shards, labels)
    index = Index(
        name=plan.name,
        label_names=plan.label_names,
        splits=splits,
        shards=shards,
        image_size=plan.image_size,
        tokenizer=tokenizer,
        fingerprint=fingerprint(shards),
        arguments=plan.arguments,
    )
    atomic_write(out / INDEX_NAME, index.to_json())
    shutil.rmtree(out / STATE_FOLDER)
    notes = sum((Counter(state.notes) for state in states), Counter[str]())
    return BuildSummary(
        plan.records,
        dict(Counter(entry.reason for entry in rejections)),
        splits,
        leaking,
        first_lines={entry.reason: entry.line for entry in reversed(rejections) if entry.line is not None},
        labels=labels,
        vocabulary=vocabulary,
        published_counts=plan.published_counts,
        remarks=[
            *plan.remarks,
            *(f"{note}: {count:,}" for note, count in sorted(notes.items())),
            *_remarks_on_splits(plan, splits),
        ],
    )


def _most_frequent(rejections: list[Rejection]) -> str:
    """The reason of most rejections, how many have it, and where the first of them is; "" without any."""
    if not rejections:
        return ""
    ((reason, count),) = Counter(entry.reason for entry in rejections).most_common(1)
    first = next(entry for entry in rejections if entry.reason == reason)
    where = f"record {first.record}" if first.line is None else f"line {first.line:,}"
    return f": {count:,} x {reason} (first in {where})"


def _remarks_on_splits(plan: BuildPlan, splits: Mapping[str, SplitTotals]) -> list[str]:
    """Say where a small dataset has no split but train, though others were asked for."""
    shares = plan.arguments.get("split")
    asked = [split for split, share in shares.items() if share] if isinstance(shares, dict) else []
    if set(splits) != {_TRAIN} or asked == [_TRAIN]:
        return []
    return [
        "every patient is in train, so that nothing can be validated or evaluated: build more patients, or "
        "give the other splits larger shares (--split train=0.6,valid=0.2,test=0.2)"
    ]


def _all_states(out: Path, plan: BuildPlan) -> list[ShardState]:
    states = {file: ShardState.load(out, file) for file in plan.files}
    missing = [file for file, state in states.items() if state is None or not state.has_files(out)]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(plan.files)} shards are not built yet (the first is {missing[0]}); "
            "run the missing parts first"
        )
    return [state for state in states.values() if state is not None]


def _rejected_lines(rejections: list[Rejection], source: str) -> bytes:
    def line(entry: Rejection) -> dict[str, Any]:
        where = {} if entry.line is None else {"line": entry.line}
        return {"record": entry.record, **where, "source": source, "reason": entry.reason}

    return "".join(json.dumps(line(entry)) + "\n" for entry in rejections).encode()


def _totals(
    out: Path, shards: list[Shard], labels: dict[str, Counter[LabelValue]]
) -> tuple[dict[str, SplitTotals], int]:
    """Totals of each split, and the number of patients in more than one; counts values in `labels`."""
    patients: dict[str, set[str]] = defaultdict(set)
    studies: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for shard in shards:
        for _, _, metadata in scan_shard(out, shard, list(labels), METADATA_EXTENSION):
            patients[shard.split].add(metadata["patient_id"])
            studies[shard.split].add((metadata["patient_id"], metadata["study_id"]))
            for name, values in labels.items():
                values[metadata["labels"].get(name)] += 1
    totals = {
        split: SplitTotals(
            samples=sum(shard.samples for shard in shards if shard.split == split),
            patients=len(patients[split]),
            studies=len(studies[split]),
            shards=sum(shard.split == split for shard in shards),
            bytes=sum(shard.bytes for shard in shards if shard.split == split),
        )
        for split in patients
    }
    occurrences = Counter(patient for members in patients.values() for patient in members)
    return totals, sum(count > 1 for count in occurrences.values())


def _write_tokenizer(out: Path, plan: BuildPlan, shards: list[Shard]) -> tuple[str | None, Vocabulary | None]:
    """Write `tokenizer.json`; returns its hash, None where there is no text to train one on."""
    vocabulary = None
    if plan.tokenizer is not None:
        tokenizer = load_tokenizer(plan.tokenizer)
    else:
        counts = count_words(_train_reports(out, plan, shards), plan.min_patients)
        if not counts.occurrences:
            return None, None
        tokenizer = train_wordpiece(counts, plan.vocab_size, plan.min_patients)
        words, size = len(counts.shared(plan.min_patients)), tokenizer.get_vocab_size()
        left_out = len(counts.occurrences) - words
        vocabulary = Vocabulary(size, counts.patients, plan.min_patients, words, left_out)
    data = tokenizer_bytes(tokenizer)
    atomic_write(out / TOKENIZER_NAME, data)
    return hash_bytes(data), vocabulary


def _train_reports(out: Path, plan: BuildPlan, shards: list[Shard]) -> Iterator[tuple[str, str]]:
    """Patient and report of each training sample."""
    for shard in shards:
        if shard.split == _TRAIN:
            for _, _, metadata in scan_shard(out, shard, plan.label_names, METADATA_EXTENSION):
                yield metadata["patient_id"], " ".join(metadata["sentences"])
