"""What a run folder tells without its weights: curves, events, config, data, environment."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from medvlp.runs.errors import RunFolderError
from medvlp.runs.events import EVENTS
from medvlp.runs.identity import IDENTITY
from medvlp.runs.run_folder import CONFIG, ENVIRONMENT
from shards.strict_json import JsonError, parse_json, read_limited
from shards.strict_yaml import YAML_LIMIT, YamlError, parse_yaml

METRICS = "metrics.jsonl"
_LONGEST_LINE, _LIMIT = 1 << 22, 1 << 26
#: Names of metrics that are drawn; a file of a stranger may hold any.
_NAME = re.compile(r"[\w./@% +-]{1,80}")
#: Config keys that name a run, or places of the machine it was trained on.
_PLACES = ("run.dir", "run.name", "data.root", "data.cache_dir")
_ABSOLUTE = re.compile(r"(?<![\w./])/(?:[^\s/]+/)+")
#: Points of a curve; a longer one is thinned evenly.
POINTS = 500
#: Axes of numbers near the largest of all floats overflow.
_DRAWN = 1e300
#: Kinds of events after which a run went on anew.
_RESTARTS = ("resume",)


@dataclass
class History:
    """One run folder.

    Attributes:
        folder: of the run. name: what people call it.
        curves: metric -> (steps, values), finite values only, at most `POINTS` of them.
        restarts: steps from which it was resumed. events: kind -> how often.
        config: dotted key -> value. data: `identity.json`'s datasets. environment: as stored.
        origin: of imported weights, where they come from.
    """

    folder: Path
    name: str
    curves: dict[str, tuple[list[int], list[float]]] = field(default_factory=dict)
    restarts: list[int] = field(default_factory=list)
    events: dict[str, int] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    data: list[dict[str, Any]] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)


def read_history(folder: Path) -> History:
    """Read a run folder; files it lacks (a run that was only imported has no metrics) are left out.

    Raises:
        RunFolderError: it is no run folder, or a file in it is no such file.
    """
    if not (folder / CONFIG).is_file():
        raise RunFolderError(f"{folder}: no run folder (it has no {CONFIG})")
    try:
        config = parse_yaml(read_limited(folder / CONFIG, YAML_LIMIT).decode())
        values = dict(flat(config)) if isinstance(config, dict) else {}
        events = list(_lines(folder / EVENTS))
        found = History(folder, str(values.get("run.name") or folder.resolve().name), config=values)
        found.curves = _curves(_lines(folder / METRICS))
        found.environment = _json(folder / ENVIRONMENT)
        found.data, found.origin = _made_from(_json(folder / IDENTITY))
    except (OSError, JsonError, YamlError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RunFolderError(f"{folder}: a file of it cannot be read ({reason})") from error
    found.events = dict(Counter(str(event.get("kind"))[:40] for event in events))
    found.restarts = [event["step"] for event in events
                      if event.get("kind") in _RESTARTS and _is_step(event.get("step"))]  # fmt: skip
    return found


def without_places(text: str) -> str:
    """A text with the last part alone of every absolute path: "local-dir:/data/a/b" -> "local-dir:…/b"."""
    return _ABSOLUTE.sub("…/", text)


def differences(histories: Sequence[History]) -> list[tuple[str, list[Any]]]:
    """(key, value in each run) of the config keys that are not the same in all; places are left out."""
    keys = sorted({key for history in histories for key in history.config})
    rows = [(key, [history.config.get(key) for history in histories]) for key in keys]
    return [(key, values) for key, values in rows
            if key not in _PLACES and any(value != values[0] for value in values)]  # fmt: skip


def chosen_values(history: History, defaults: Mapping[str, Any]) -> list[tuple[str, list[Any]]]:
    """(key, [value]) of the keys of one run that are not the default."""
    return [(key, [value]) for key, value in sorted(history.config.items())
            if key not in _PLACES and defaults.get(key) != value]  # fmt: skip


def _curves(lines: Iterator[dict[str, Any]]) -> dict[str, tuple[list[int], list[float]]]:
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for line in lines:
        step = line.get("step")
        if not _is_step(step):
            continue
        for name, value in line.items():
            if _is_drawn(value) and name not in ("step", "epoch") and _NAME.fullmatch(name):
                steps, values = curves.setdefault(name, ([], []))
                steps.append(step)
                values.append(float(value))
    return {name: (_thinned(steps), _thinned(values)) for name, (steps, values) in curves.items()}


def _is_step(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 2**53


def _is_drawn(value: Any) -> bool:
    """Whether a value is a number that an axis can show."""
    return type(value) in (int, float) and abs(value) < _DRAWN


def _made_from(identity: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The datasets and the origin that `identity.json` tells of.

    Raises:
        JsonError: they are no such things.
    """
    data, origin = identity.get("data", []), identity.get("origin") or {}
    if not (isinstance(data, list) and isinstance(origin, dict)):
        raise JsonError(f"data or origin in {IDENTITY} are not as a run stores them")
    records = [record for record in data if isinstance(record, dict)]
    if not all(isinstance(record.get("licences", []), list) for record in records):
        raise JsonError(f"licences in {IDENTITY} are no list")
    return records, {str(key): str(value) for key, value in origin.items()}


def _thinned(values: list[Any]) -> list[Any]:
    """At most `POINTS` of them, evenly, the last one among them."""
    every = -(-len(values) // POINTS) if values else 1
    return values[::-every][::-1]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a `.jsonl` file; a torn last line of a run that goes on is passed over."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        while line := file.readline(_LONGEST_LINE):
            try:
                value = parse_json(line, _LONGEST_LINE)
            except JsonError:
                continue
            if isinstance(value, dict):
                yield value


def _json(path: Path) -> dict[str, Any]:
    value = parse_json(read_limited(path, _LIMIT), _LIMIT) if path.is_file() else {}
    return value if isinstance(value, dict) else {}


def flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in nested sections."""
    if not isinstance(tree, dict):
        yield prefix, tree
        return
    for key, value in tree.items():
        yield from flat(value, f"{prefix}.{key}" if prefix else str(key))
