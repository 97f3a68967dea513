"""Checks a dataset against its index and itself, and lists everything that is wrong."""

from __future__ import annotations

import itertools
import tarfile
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from shards.errors import DataError
from shards.fingerprints import pixel_hash
from shards.format import (
    IMAGE_EXTENSIONS,
    IMAGE_LIMIT,
    METADATA_EXTENSION,
    TOKENIZER_NAME,
    Index,
    Shard,
    hash_file,
)
from shards.images import decode_turned
from shards.masks import read_masks
from shards.metadata import METADATA_LIMIT, metadata_problems
from shards.progress import tracked
from shards.shard_index import SHARD_INDEX_LIMIT, ShardIndex
from shards.strict_json import JsonError, parse_json, read_limited
from shards.workers import run_tasks

#: Offset and size of a member's content in bytes.
Span = tuple[int, int]


@dataclass
class ShardReport:
    """What was found in one shard: problems, sample keys in order, patients, and hashes of pixels by key."""

    shard: Shard
    problems: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    patients: list[str] = field(default_factory=list)
    pixels: dict[int, str] = field(default_factory=dict)


def verify(root: Path, workers: int = 1) -> list[str]:
    """Everything wrong with the dataset in `root`, one line each; empty when all is well.

    Checks hashes, `.idx` against tar, that every image decodes to the stored size, the schema of every
    metadata member, duplicate keys, patients and images in two splits, totals, and files the index does not
    know.
    Lines hold shard names and sample keys, never patient ids or text.

    Raises:
        DataError: there is no readable index.
    """
    index = Index.load(root)
    checked = run_tasks(_check_shard, (root, index), index.shards, workers)
    reports = sorted(
        tracked(checked, "verifying shards", len(index.shards)), key=lambda report: report.shard.file
    )
    problems = [problem for report in reports for problem in report.problems]
    problems += _duplicate_keys(reports)
    problems += _leaking_patients(reports)
    problems += _leaking_images(reports)
    problems += _totals_problems(index, reports)
    return problems + _folder_problems(root, index)


def _check_shard(shared: tuple[Path, Index], shard: Shard) -> ShardReport:
    root, index = shared
    report = ShardReport(shard)
    for file, expected in ((shard.file, shard.hash), (shard.index_file, shard.index_hash)):
        if not (root / file).is_file():
            report.problems.append(f"{file}: missing")
            return report
        if hash_file(root / file) != expected:
            report.problems.append(f"{file}: content differs from its hash in the index")
    try:
        spans = _check_tar(root / shard.file, index, report)
    except (tarfile.TarError, OSError, EOFError) as error:
        report.problems.append(f"{shard.file}: not a readable tar ({error})")
        return report
    _check_spans(root, shard, spans, report)
    return report


def _check_tar(path: Path, index: Index, report: ShardReport) -> list[tuple[str, dict[str, Span]]]:
    """Check sample after sample, one in memory at a time; return (key, {extension: (offset, size)})."""
    spans = []
    known = {*IMAGE_EXTENSIONS, METADATA_EXTENSION, index.masks_extension}
    with tarfile.open(path, "r:") as archive:
        for key, members in itertools.groupby(archive, key=lambda member: member.name.partition(".")[0]):
            sample_spans: dict[str, Span] = {}
            contents: dict[str, bytes] = {}
            for member in members:
                extension = member.name.partition(".")[2]
                plain = member.isfile() and not member.issparse()
                stream = archive.extractfile(member) if plain else None
                if stream is None or "/" in key or extension not in known or extension in contents:
                    report.problems.append(f"{path.name}: member {member.name!r} does not belong there")
                    continue
                sample_spans[extension] = (member.offset_data, member.size)
                most = METADATA_LIMIT if extension == METADATA_EXTENSION else IMAGE_LIMIT
                contents[extension] = stream.read(most + 1)
                if len(contents[extension]) > most:
                    del contents[extension]
                    report.problems.append(
                        f"{path.name}: sample {key}: .{extension} has more than the limit of {most} bytes"
                    )
            problems = _sample_problems(key, contents, index, report)
            report.problems += [f"{path.name}: sample {key}: {problem}" for problem in problems]
            report.keys.append(key)
            spans.append((key, sample_spans))
    return spans


def _check_spans(
    root: Path, shard: Shard, actual: list[tuple[str, dict[str, Span]]], report: ShardReport
) -> None:
    try:
        data = read_limited(root / shard.index_file, SHARD_INDEX_LIMIT)
        index = ShardIndex.from_bytes(data, shard.index_file, (root / shard.file).stat().st_size)
    except DataError as error:
        report.problems.append(str(error))
        return
    except JsonError as error:
        report.problems.append(f"{shard.index_file}: {error}")
        return
    if actual != [(key, index.members(row)) for row, key in enumerate(index.keys)]:
        report.problems.append(f"{shard.index_file}: does not describe {shard.file}")


def _sample_problems(key: str, contents: dict[str, bytes], index: Index, report: ShardReport) -> list[str]:
    problems = []
    images = [extension for extension in IMAGE_EXTENSIONS if extension in contents]
    if len(images) != 1:
        problems.append(f"has {len(images)} images instead of one")
    for extension in images:
        problems += _image_problems(key, contents[extension], index.image_size, report)
    if METADATA_EXTENSION not in contents:
        return [*problems, "has no metadata"]
    try:
        metadata = parse_json(contents[METADATA_EXTENSION], METADATA_LIMIT)
    except JsonError as error:
        return [*problems, f"its metadata cannot be used ({error})"]
    if schema_problems := metadata_problems(metadata, index.label_names, index.version):
        return problems + schema_problems
    report.patients.append(metadata["patient_id"])
    try:
        read_masks(contents, metadata.get("masks", []), index.label_names, index.image_size)
    except DataError as error:
        problems.append(str(error))
    return problems


def _image_problems(key: str, data: bytes, size: int, report: ShardReport) -> list[str]:
    try:
        image, orientation = decode_turned(data)
    except DataError as error:
        return [str(error)]
    if orientation != 1:
        return [f"EXIF orientation {orientation} turns the image, which training reads as it is stored"]
    report.pixels.setdefault(pixel_hash(image), key)
    height, width = image.shape
    return [] if (height, width) == (size, size) else [f"image is {width} x {height}, not {size} x {size}"]


def _duplicate_keys(reports: list[ShardReport]) -> list[str]:
    first: dict[str, str] = {}
    problems = []
    for report in reports:
        for key in report.keys:
            if key in first:
                problems.append(f"{report.shard.file}: sample {key} is in {first[key]} too")
            first.setdefault(key, report.shard.file)
    return problems


def _leaking_patients(reports: list[ShardReport]) -> list[str]:
    """One line for each patient in more than one split, naming a shard of each instead of the patient."""
    places: dict[str, dict[str, str]] = defaultdict(dict)
    for report in reports:
        for patient in report.patients:
            places[patient].setdefault(report.shard.split, report.shard.file)
    return [
        f"a patient is in more than one split ({', '.join(sorted(files))}): see {', '.join(files.values())}"
        for files in places.values()
        if len(files) > 1
    ]


def _leaking_images(reports: list[ShardReport]) -> list[str]:
    """One line for each image that stands in more than one split, naming a sample of each."""
    places: dict[int, dict[str, str]] = defaultdict(dict)
    for report in reports:
        for pixels, key in report.pixels.items():
            places[pixels].setdefault(report.shard.split, f"{report.shard.file}: {key}")
    return [
        f"an image is in several splits ({', '.join(sorted(samples))}): see {', '.join(samples.values())}"
        for samples in places.values()
        if len(samples) > 1
    ]


def _totals_problems(index: Index, reports: list[ShardReport]) -> list[str]:
    problems = [
        f"{report.shard.file}: holds {len(report.keys)} samples, the index says {report.shard.samples}"
        for report in reports
        if len(report.keys) != report.shard.samples
    ]
    return problems + [f"index: {problem}" for problem in index.contradictions()]


def _folder_problems(root: Path, index: Index) -> list[str]:
    known = {shard.file for shard in index.shards}
    problems = [
        f"{path.name}: is not in the index" for path in sorted(root.glob("*.tar")) if path.name not in known
    ]
    if index.tokenizer is not None:
        path = root / TOKENIZER_NAME
        if not path.is_file():
            problems.append(f"{TOKENIZER_NAME}: missing")
        elif hash_file(path) != index.tokenizer:
            problems.append(f"{TOKENIZER_NAME}: content differs from its hash in the index")
    return problems
