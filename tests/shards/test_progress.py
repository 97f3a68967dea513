"""Long work tells how far it is: a bar on a terminal, lines in a log, nothing for short work."""

from __future__ import annotations

import pytest

from shards import progress
from shards.progress import meter, tracked


def test_short_work_leaves_no_line_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(tracked(range(3), "counting", 3)) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_long_work_leaves_lines_with_the_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 10_000, 20))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    batches = [[1] * 100] * 6
    assert list(tracked(batches, "embedding", 1_600, done=1_000, size=len)) == batches
    # A step takes 20 s, a line comes after 30 s: at 40, 80 and, all being done, no more at 120.
    assert capsys.readouterr().err.splitlines() == [
        "embedding: 1,200 of 1,600, about 0:01:20 left",
        "embedding: 1,400 of 1,600, about 0:00:40 left",
    ]


def test_a_terminal_gets_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert list(tracked(range(3), "counting", 5, done=2)) == [0, 1, 2]
    shown = capsys.readouterr().err
    assert "counting" in shown
    assert "5/5" in shown


def test_work_that_is_no_loop_tells_how_far_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 10_000, 40))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    with meter("writing", 4) as advance:
        advance(1)
        advance(0)
        advance(3)
    assert capsys.readouterr().err.splitlines() == [
        "writing: 1 of 4, about 0:02:00 left",
        "writing: 1 of 4, about 0:04:00 left",
    ]
    monkeypatch.setenv("FORCE_COLOR", "1")
    with meter("writing", 4) as advance:
        advance(3)
    assert "3/4" in capsys.readouterr().err


def test_an_error_of_the_work_ends_it(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> object:
        yield 1
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        list(tracked(work(), "counting", 3))
