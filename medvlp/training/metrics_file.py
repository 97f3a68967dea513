"""`metrics.jsonl`: one JSON object for every logged step, each step once, also across restarts."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path


class MetricsFile:
    """Appends to `metrics.jsonl`; lines beyond the step a run resumes from are cut first.

    Args:
        path: the file.
        step: finished steps of the run; later lines (and a torn last one) are removed.
    """

    def __init__(self, path: Path, step: int):
        if path.exists():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step(line) <= step]
            partial = path.with_suffix(".partial")
            with partial.open("w", encoding="utf-8") as file:
                file.writelines(line + "\n" for line in kept)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, metrics: Mapping[str, float | None]) -> None:
        """Append one line; None becomes null."""
        self._file.write(json.dumps(metrics, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Make the lines durable."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
