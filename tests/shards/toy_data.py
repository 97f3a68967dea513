"""Helpers of the tests of `shards`: building in one go, comparing folders, writing tables."""

from __future__ import annotations

import csv
import os
from pathlib import Path

from shards.build import BuildOptions, build_shards
from shards.merge import BuildSummary, merge
from shards.plan import Part
from shards.sample import StoredImage
from shards.sources.base import Source

Rows = list[dict[str, str]]
MAP = """\
image: image
patient_id: patient
report: report
"""


def build(source: Source, out: Path, options: BuildOptions | None = None, workers: int = 1) -> BuildSummary:
    """Build and merge in one go."""
    options = options or BuildOptions(image=StoredImage(size=32), records_per_shard=8)
    build_shards(source, out, options, workers, Part(0, 1))
    return merge(out)


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its relative path, hidden ones included."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_csv(path: Path, rows: Rows) -> Path:
    """Write rows with the union of their keys as header."""
    header = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, header, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def add(shared: int, task: int) -> int:
    """A task for worker processes: the sum, an error at 13, the end of the process at 99."""
    if task == 13:
        raise KeyError(task)
    if task == 99:
        os._exit(9)
    return shared + task
