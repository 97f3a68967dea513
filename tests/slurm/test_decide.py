"""What follows the end of a job's step: the pure decision, and its record in attempts.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.slurm.attempts import (
    NODE_EXITS,
    AttemptError,
    end_attempt,
    note_node_exit,
    read_attempts,
    request_cancel,
    start_attempt,
)
from launcher.slurm.requeue import REAL_ERRORS, Attempt, decide, first_cause, may_start

CODES = st.sampled_from([None, 0, 1, 2, 3, 4, 5, 6, 7, 8, 75, 99, 127, 134, 137, 138, 139])


def ended(restart: int, code: int | None, step: int | None, asked: bool = False, **more: str) -> Attempt:
    return Attempt(1, restart, "node[1-2]", "then", "later", code, step, asked, **more)


@pytest.mark.parametrize(
    ("code", "asked", "action", "reason"),
    [
        (0, False, "done", "finished"),
        (0, True, "done", "finished"),
        (75, True, "requeue", "interrupted after a checkpoint (code 75) at step 4"),
        (75, False, "requeue", "interrupted after a checkpoint"),
        (138, True, "requeue", "SIGUSR1"),
        (6, False, "requeue", "lost another rank (code 6) at step 4"),
        (7, False, "requeue", "did not arrive in time"),
        (137, False, "requeue", "killed by SIGKILL"),
        (None, False, "requeue", "without a word"),
        (None, True, "requeue", "did not save in the time left at step 4"),
        (1, False, "stop", "another start would not help"),
        (2, False, "stop", "another start would not help"),
        (3, True, "stop", "data (code 3) at step 4"),
        (4, False, "stop", "another start would not help"),
        (5, False, "stop", "another start would not help"),
        (9, False, "stop", "another start would not help"),
        (10, False, "requeue", "bad nodes"),
        (99, False, "stop", "exit code 99"),
    ],
)
def test_every_exit_code_has_its_consequence(code: int, asked: bool, action: str, reason: str) -> None:
    decision = decide([], ended(0, code, 4, asked), max_requeues=3)
    assert decision.action == action
    assert reason in decision.reason


def test_two_failures_at_one_step_stop_and_at_different_steps_do_not() -> None:
    earlier = [ended(0, 137, 7), ended(1, 75, 9)]
    assert (
        decide(earlier, ended(2, 139, 7), 9).reason == "failed twice at step 7: killed by SIGSEGV (code 139)"
    )
    assert decide(earlier, ended(2, 139, 9), 9).action == "requeue"
    assert decide(earlier, ended(2, 75, 7), 9).action == "requeue"


def test_a_lost_node_is_no_failure_of_the_run() -> None:
    lost = Attempt(1, 0, "node1", "then", step=7)
    assert decide([lost], ended(1, 137, 7), 9).action == "requeue"


def test_the_user_and_slurm_end_a_job_for_good() -> None:
    assert "cancelled on request" in decide([], ended(0, 75, 4), 9, cancelled=True).reason
    decision = decide([], ended(0, 75, 4), 9, terminated=True)
    assert (decision.action, "Slurm is ending the job" in decision.reason) == ("leave", True)


def test_slurm_may_start_a_job_again_that_it_ended(tmp_path: Path) -> None:
    start_attempt(tmp_path, 5, slurm(tmp_path, 0))
    assert end_attempt(tmp_path, 6, 5, False, True, slurm(tmp_path, 0))[0].action == "leave"
    assert start_attempt(tmp_path, 5, slurm(tmp_path, 1)).restart == 1


def test_a_job_whose_time_is_too_short_for_a_step_stops() -> None:
    history = [ended(restart, 138, None, asked=True) for restart in range(8)]
    assert decide(history, ended(8, 75, None, asked=True), 99).action == "requeue"
    decision = decide([*history, ended(8, 75, None)], ended(9, 138, None, asked=True), 99)
    assert (decision.action, "10 starts without a step" in decision.reason) == ("stop", True)


@settings(max_examples=200)
@given(
    st.lists(st.tuples(CODES, st.integers(0, 2), st.booleans()), min_size=1, max_size=12),
    st.integers(0, 5),
)
def test_a_job_always_ends(ends: list[Any], max_requeues: int) -> None:
    """Played through as a batch script would: never more starts than allowed, never on after a real error."""
    history: list[Attempt] = []
    for restart, (code, step, asked) in enumerate(ends):
        if may_start(history, restart, max_requeues):
            break
        attempt = ended(restart, code, step, asked)
        decision = decide(history, attempt, max_requeues)
        assert decision.reason
        assert (decision.action == "done") == (code == 0)
        if code in REAL_ERRORS:
            assert decision.action == "stop"
        history.append(attempt)
        if decision.action != "requeue":
            break
    assert len(history) <= max_requeues + 1
    failures = [
        attempt.step
        for attempt in history[:-1]
        if attempt.exit_code != 75
        and not (attempt.asked and (attempt.exit_code is None or attempt.exit_code > 128))
    ]
    assert len(failures) == len(set(failures))


@settings(max_examples=25)
@given(st.lists(st.tuples(st.floats(0, 9), st.sampled_from([0, 3, 6, 75, 137])), max_size=5))
def test_the_first_cause_over_nodes(ends: list[tuple[float, int]]) -> None:
    cause = first_cause(ends)
    codes = {code for _, code in ends}
    if not ends:
        assert cause is None
    elif codes <= {0}:
        assert cause == 0
    elif codes <= {0, 6}:
        assert cause == 6
    else:
        assert cause not in (0, 6)
        earliest = min(time for time, code in ends if code not in (0, 6))
        assert (earliest, cause) in ends


def slurm(run: Path, restart: int) -> dict[str, str]:
    exits = {NODE_EXITS: str(run / f"slurm/exits/7-{restart}")}
    return {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restart), "SLURM_JOB_NODELIST": "n[1-2]"} | exits


def test_starts_and_ends_are_recorded_one_line_each(tmp_path: Path) -> None:
    start_attempt(tmp_path, 5, slurm(tmp_path, 0))
    assert read_attempts(tmp_path)[0].ended is None
    (tmp_path / "metrics.jsonl").write_text('{"step": 3}\n{"step": 4}\n{"ste')
    note_node_exit(0, 6, slurm(tmp_path, 0))
    note_node_exit(1, 7, slurm(tmp_path, 0))
    decision, code = end_attempt(tmp_path, 7, 5, False, False, slurm(tmp_path, 0))
    assert (decision.action, code) == ("requeue", 7)
    start_attempt(tmp_path, 5, slurm(tmp_path, 1))
    decision, code = end_attempt(tmp_path, 137, 5, False, False, slurm(tmp_path, 1))
    assert (decision.action, code) == ("stop", 137)  # nobody said why, at the same step
    lines = [json.loads(line) for line in (tmp_path / "slurm/attempts.jsonl").read_text().splitlines()]
    assert [(line["restart"], line["exit_code"], line["step"]) for line in lines] == [(0, 7, 4), (1, None, 4)]
    assert [line["decision"] for line in lines] == ["requeue", "stop"]
    with pytest.raises(AttemptError, match="does not start again: stopped before: failed twice at step 4"):
        start_attempt(tmp_path, 5, slurm(tmp_path, 2))


def test_slurm_itself_cannot_requeue_more_often_than_allowed(tmp_path: Path) -> None:
    start_attempt(tmp_path, 1, slurm(tmp_path, 1))
    with pytest.raises(AttemptError, match="requeued 2 times, more than max_requeues=1"):
        start_attempt(tmp_path, 1, slurm(tmp_path, 2))
    assert read_attempts(tmp_path)[-1].decision == "stop"


def test_a_request_to_cancel_counts_for_its_job_only(tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    request_cancel(tmp_path, 6)
    for restart, action in [(0, "requeue"), (1, "stop")]:
        start_attempt(tmp_path, 5, slurm(tmp_path, restart))
        assert end_attempt(tmp_path, 75, 5, True, False, slurm(tmp_path, restart))[0].action == action
        request_cancel(tmp_path, 7)


def test_a_run_folder_that_cannot_be_used_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "slurm").write_text("not a folder")
    with pytest.raises(AttemptError, match="slurm"):
        start_attempt(tmp_path, 5, slurm(tmp_path, 0))
    with pytest.raises(AttemptError):
        end_attempt(tmp_path, 75, 5, True, False, slurm(tmp_path, 0))


def test_what_is_no_attempt_in_the_record_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm/attempts.jsonl").write_text('nothing\n[1]\n{"job_id": 7}\n')
    start_attempt(tmp_path, 5, slurm(tmp_path, 0))
    assert len(read_attempts(tmp_path)) == 1
