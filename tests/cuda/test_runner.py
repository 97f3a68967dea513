"""Checks run in a process of their own, within the time there is."""

from __future__ import annotations

import functools
import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.cuda import runner
from tests.cuda.place import Place
from tests.cuda.plan import CHECKS_SECONDS, FIGURES, FIGURES_SECONDS
from tests.cuda.runner import Check, run_checks, time_for
from tests.cuda.verdicts import VERDICTS


def test_a_check_that_fails_dies_or_hangs_costs_itself(tmp_path: Path) -> None:
    names = ["passes", "dies", "hangs", "fails"]
    checks = [Check(name, f"tests.cuda.toy_checks:{name}", 1.0) for name in names]
    # The box of the last one leaves the others none to spare.
    checks.append(Check("last", "tests.cuda.toy_checks:passes", 100.0))
    report = tmp_path / "checks.json"
    results = run_checks({report: checks}, Place(True, str(tmp_path), "here"), 100, lambda line: None)
    assert [result.outcome for result in results] == ["passed", "died", "cut off", "failed", "passed"]
    assert [result.figures for result in results] == [
        {"place": "here"},
        {"before": 1},
        {"before": 2},
        {},
        {"place": "here"},
    ]
    assert "exit code -6" in results[1].error
    assert "a number is wrong" in results[3].error
    written = json.loads(report.read_text())
    assert [check["outcome"] for check in written["checks"]] == [result.outcome for result in results]


def test_the_boxes_of_the_figures_are_the_time_there_is() -> None:
    assert sum(check.seconds for check in FIGURES) == FIGURES_SECONDS == 200
    assert CHECKS_SECONDS == 300
    judged = {name for _, name, _ in VERDICTS}
    least = max(place for place, check in enumerate(FIGURES) if check.name in judged)
    assert {check.name for check in FIGURES[: least + 1]} == judged | {"matrices"}


def test_a_check_gets_its_box_and_what_others_spare_but_never_more_than_is_left() -> None:
    checks = [Check(name, "-", seconds) for name, seconds in (("a", 40.0), ("b", 10.0), ("c", 50.0))]
    assert time_for(checks, 100.0) == 40.0
    assert time_for(checks[1:], 95.0) == 45.0
    assert time_for(checks[1:], 55.0) == 10.0
    assert time_for(checks[2:], 12.0) == 12.0


def test_checks_that_all_hang_end_when_their_time_is_over(tmp_path: Path) -> None:
    """Boxes of more than there is time for change nothing about it."""
    names = ["first", "second", "third", "last"]
    checks = [Check(name, "tests.cuda.toy_checks:hangs", 300.0) for name in names]
    report, started = tmp_path / "figures.json", time.monotonic()
    run_checks({report: checks}, Place(True, str(tmp_path), ""), 5.0, lambda line: None)
    assert time.monotonic() - started < 100  # far from a box, and from what a busy machine takes to end it
    written = json.loads(report.read_text())
    assert written["seconds_allowed"] == 5.0
    # On a busy machine not even the first may have begun.
    assert written["not_run"] == (names if written["checks"][0]["outcome"] == "not run" else names[1:])


def test_a_process_that_does_not_end_keeps_nobody_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that stands in the GPU's driver, which no signal ends."""
    monkeypatch.setattr(runner, "END_SECONDS", 0.1)
    killed: list[int] = []
    process = runner._Process([], Place(True, "", ""), tmp_path / "log")
    monkeypatch.setattr(runner.os, "killpg", lambda group, sign: killed.append(group))
    monkeypatch.setattr(process._process, "wait", functools.partial(wait_in_vain, process._process.args))
    process.end()
    assert killed == [process._process.pid]
    monkeypatch.undo()
    process.end()


def wait_in_vain(command: Any, seconds: float) -> None:
    raise subprocess.TimeoutExpired(command, seconds)


def test_a_report_without_time_names_what_was_not_run(tmp_path: Path) -> None:
    first, second = Check("first", "tests.cuda.toy_checks:hangs", 60.0), Check("second", "-", 1.0)
    plans = {tmp_path / "checks.json": [first], tmp_path / "figures.json": [second]}
    results = run_checks(plans, Place(True, str(tmp_path), ""), 4, lambda line: None)
    assert results[0].outcome in ("cut off", "not run")  # a busy machine may not even have begun it
    assert results[1].outcome == "not run"
    for report, result in zip(plans, results, strict=True):
        [written] = json.loads(report.read_text())["checks"]
        assert written["outcome"] == result.outcome
