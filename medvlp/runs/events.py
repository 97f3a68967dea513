"""`events.jsonl`: what happened to a run, one JSON object a line, over all its starts."""

import json
import logging
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

#: Name of the file in the run folder.
EVENTS = "events.jsonl"


class EventLog:
    """Appends to a run's `events.jsonl`. Unlike metrics, lines are never cut: they are its history.

    Every line has `time` (UTC), `kind` and `step` (finished steps); the rest depends on the kind. A file that
    cannot be written is a warning, for it must not cost the run.
    """

    def __init__(self, run_dir: Path | str):
        self.path = Path(run_dir) / EVENTS

    def note(self, kind: str, step: int, **details: Any) -> None:
        """Append one event; call it on one rank only. Numbers that are not finite become null."""
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "kind": kind, "step": step}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(_plain(line | details), allow_nan=False) + "\n")
        except OSError as error:
            logger.warning("cannot note the event %r in %s: %s", kind, self.path, error.strerror or error)


def is_finished(run: Path) -> bool:
    """Whether the last thing that happened to a run is that it finished."""
    try:
        lines = (run / EVENTS).read_text(encoding="utf-8").splitlines()
        return bool(lines) and json.loads(lines[-1]).get("kind") == "finish"
    except (OSError, ValueError):
        return False


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
