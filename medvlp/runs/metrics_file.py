"""`metrics.jsonl`: one JSON object for every logged step, each step once, also across restarts."""

import json
import math
import os
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medvlp.runs.errors import RunFolderError
from shards.strict_json import JsonError, parse_json

#: In bytes; a longer line is none of ours.
_LONGEST_LINE = 1 << 22


class MetricsFile:
    """Appends to `metrics.jsonl`; lines beyond the step a run resumes from are cut first.

    Args:
        path: the file.
        step: finished steps of the run; later lines (and a torn last one) are removed.

    Raises:
        RunFolderError: here and in the methods: the disk refused.
    """

    def __init__(self, path: Path, step: int):
        self._path = path
        with self._named_errors():
            if path.exists():
                _cut(path, step)
            self._file = path.open("a", encoding="utf-8")

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Append one line of numbers, texts and lists; None becomes null."""
        with self._named_errors():
            self._file.write(json.dumps(metrics, allow_nan=False) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Make the lines durable."""
        with self._named_errors():
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunFolderError(
                f"cannot write {self._path}: {error.strerror or error}; mend that, then start again to resume"
            ) from error


def last_lines(path: Path, most: int) -> list[dict[str, Any]]:
    """The last `most` lines of a file, each with its "step"; lines that are none are passed over.

    Raises:
        RunFolderError: it cannot be read.
    """
    found: deque[bytes] = deque(maxlen=most)
    try:
        with path.open("rb") as lines:
            while line := lines.readline(_LONGEST_LINE):
                found.append(line)
    except OSError as error:
        raise RunFolderError(f"cannot read {path}: {error.strerror or error}") from error
    return [parse_json(line, _LONGEST_LINE) for line in found if _step(line) < math.inf]


def _cut(path: Path, step: int) -> None:
    partial = path.with_suffix(".partial")
    with path.open("rb") as lines, partial.open("wb") as file:
        while line := lines.readline(_LONGEST_LINE):  # of a longer one, no piece is a whole object
            if _step(line) <= step:
                file.write(line.rstrip(b"\r\n") + b"\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _step(line: bytes) -> float:
    try:
        step = parse_json(line, _LONGEST_LINE)["step"]
    except (JsonError, KeyError, TypeError):
        return math.inf
    return step if type(step) is int else math.inf
