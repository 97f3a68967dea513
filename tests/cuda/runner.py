"""Runs checks one after the other in a process of their own, each with a time box, and writes what is known.

A check that hangs or kills its process costs itself: it is noted, and a new process goes on with the next.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.cuda.place import Place
from tests.cuda.verdicts import verdicts

#: Seconds the process of the checks gets to import torch and DeepSpeed, on a machine that has just started.
START_SECONDS = 120.0
LOOK_SECONDS = 0.1
#: Seconds to wait for a process that was killed: one that stands in the GPU's driver may stay for ever.
END_SECONDS = 3.0
NOT_RUN = "not run"


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        function: "module:name" of a `function(place, note)`.
        seconds: its box: what it may take of the time of all, when those after it need the rest.
    """

    name: str
    function: str
    seconds: float


@dataclass
class Result:
    """What is known of a check: "passed", "failed", "cut off", "died", "running" or "not run"."""

    name: str
    outcome: str = NOT_RUN
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)
    error: str = ""


def run_checks(
    plans: Mapping[Path, Sequence[Check]],
    place: Place,
    seconds: float,
    show: Callable[[str], None] = print,
) -> list[Result]:
    """Run checks within `seconds` in all; reports are written anew after every step of every check.

    Args:
        plans: the checks of each report; no two of one name. Beside the first report lies the log of all.

    Returns:
        one result for each check, in order; those there was no time for are "not run".
    """
    waiting = [check for checks in plans.values() for check in checks]
    results = {check.name: Result(check.name) for check in waiting}
    started = time.monotonic()
    log = next(iter(plans)).with_suffix(".log")
    log.unlink(missing_ok=True)

    def write() -> None:
        for report, checks in plans.items():
            found: dict[str, Any] = {
                "dry": place.dry,
                "seconds": round(time.monotonic() - started, 1),
                "seconds_allowed": seconds,
                "not_run": [check.name for check in checks if results[check.name].outcome == NOT_RUN],
            }
            if not place.dry:
                found["verdicts"] = verdicts({check.name: results[check.name].figures for check in checks})
            found["checks"] = [asdict(results[check.name]) for check in checks]
            part = report.with_suffix(".part")
            part.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            part.replace(report)

    write()
    while waiting and time.monotonic() - started < seconds:
        process = _Process(waiting, place, log)
        try:
            waiting = _follow(process, waiting, results, started + seconds, write, show)
        finally:
            process.end()
    write()
    return list(results.values())


def time_for(checks: Sequence[Check], left: float) -> float:
    """Seconds for the first of these checks, of `left` for all: its box, or all that others spare."""
    others = sum(check.seconds for check in checks[1:])
    return min(left, max(checks[0].seconds, left - others))


def _follow(
    process: _Process,
    checks: Sequence[Check],
    results: dict[str, Result],
    deadline: float,
    write: Callable[[], None],
    show: Callable[[str], None],
) -> list[Check]:
    """Take in what a process tells until it ends or must be ended; the checks that are left."""
    left, current, since, allowed = list(checks), None, time.monotonic(), START_SECONDS
    while left:
        alive = process.is_alive()  # asked first: what it said before its end is read below
        for line in process.news():
            result = results[line["check"]]
            if line["event"] == "begin":
                current, since, result.outcome = result, time.monotonic(), "running"
                allowed = time_for(left, deadline - since)
            elif line["event"] == "figure":
                result.figures[line["name"]] = line["value"]
            else:
                result.outcome = "failed" if line["error"] else "passed"
                result.error, result.seconds = line["error"], line["seconds"]
                show(f"{result.outcome:8} {result.name}, {result.seconds:.1f} s {result.error[-300:]}")
                current, since, left, allowed = None, time.monotonic(), left[1:], START_SECONDS
            write()
        now = time.monotonic()
        if now > deadline and current is None:
            return []  # none of those left has begun
        late = now - since > allowed or now > deadline
        if left and (late or not alive):
            result = current or results[left[0].name]
            result.outcome, result.seconds = "cut off" if alive else "died", round(now - since, 1)
            result.error = f"see the log: exit code {process.code()}" if not alive else "its time was over"
            show(f"{result.outcome:8} {result.name}, {result.seconds:.1f} s {result.error}")
            write()
            return left[1:]
        time.sleep(LOOK_SECONDS)
    return []


class _Process:
    """The process that runs checks, and what it has told so far."""

    def __init__(self, checks: Sequence[Check], place: Place, log: Path):
        self._news = log.with_suffix(".jsonl")
        self._news.write_bytes(b"")
        self._read = 0
        orders = {"place": asdict(place), "news": str(self._news), "checks": [asdict(c) for c in checks]}
        # It must outlive a check that kills its own group, and take its children with it when it is killed.
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.cuda.runner", json.dumps(orders)],
                stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
            )  # fmt: skip

    def news(self) -> list[dict[str, Any]]:
        with self._news.open("rb") as file:
            file.seek(self._read)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._read += len(whole)
        return [json.loads(line) for line in whole.splitlines()]

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def code(self) -> int | None:
        return self._process.returncode

    def end(self) -> None:
        with suppress(ProcessLookupError):  # it and its children have ended
            os.killpg(self._process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(END_SECONDS)
        self._news.unlink(missing_ok=True)


#: Takes the name and the value of a figure; it is in the report from then on, whatever happens later.
Note = Callable[[str, Any], None]


def serve(orders: dict[str, Any]) -> None:
    """Run checks in this process and tell of each as it goes."""
    place = Place(**orders["place"])
    with Path(orders["news"]).open("a", encoding="utf-8", buffering=1) as file:

        def tell(check: str, event: str, **more: Any) -> None:
            file.write(json.dumps({"check": check, "event": event, **more}, default=str) + "\n")

        for name, function, _ in (check.values() for check in orders["checks"]):
            module, _, attribute = function.partition(":")
            error, run = "", getattr(importlib.import_module(module), attribute)
            tell(name, "begin")
            started = time.monotonic()
            try:
                run(place, lambda figure, value, name=name: tell(name, "figure", name=figure, value=value))
            except Exception:
                error = traceback.format_exc()
            tell(name, "end", error=error[-3000:], seconds=round(time.monotonic() - started, 2))


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
