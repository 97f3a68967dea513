"""What follows when a job's step has ended: nothing, another start, or a stop with a reason. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from launcher.run_state import meaning

#: Saved and stopped on request; see medvlp.training.interrupts.
INTERRUPTED = 75
#: Lost another rank: what is left when nobody else says more.
LOST_RANK = 6
#: A rank did not arrive in time.
HANG = 7
#: `medvlp doctor` found nodes to leave out of the next start.
BAD_NODES = 10
#: A second start would meet them again: unexpected error, config, data, checkpoint, bad steps, Slurm refused.
REAL_ERRORS = frozenset({1, 2, 3, 4, 5, 8})
#: Starts in a row that end at the same step, whatever ends them, before a job stops.
NO_PROGRESS = 10


@dataclass(frozen=True)
class Attempt:
    """One start of a batch script: a line of attempts.jsonl.

    Attributes:
        job_id, restart: Slurm's job id, and how often it had requeued the job before this start.
        nodes: node list.
        started, ended: UTC, ISO 8601; `ended` is None when the script was killed or its node lost.
        exit_code: of the step, the first cause over all nodes; None: as `ended`, or no node could say one.
        step: last logged optimiser step of the run at the end (while it goes on, at the start); None: none.
        asked: Slurm warned of the time limit or of a preemption.
        decision, reason: what followed.
    """

    job_id: int
    restart: int
    nodes: str
    started: str
    ended: str | None = None
    exit_code: int | None = None
    step: int | None = None
    asked: bool = False
    decision: str | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Decision:
    """What the batch script does next, and why.

    Attributes:
        action: done; requeue; stop, after which the job does not start again; or leave it to Slurm, which is
            ending the job: it requeues one that was preempted or lost a node, and forgets a cancelled one.
        reason: in words.
    """

    action: Literal["done", "requeue", "stop", "leave"]
    reason: str


def first_cause(ends: Sequence[tuple[float, int]]) -> int | None:
    """The exit code of a step from those of its nodes, each with the time at which it ended.

    The earliest that is no success; one that only lost another rank counts when there is nothing else. None
    without any node.
    """
    if not ends:
        return None
    failed = sorted((time, code) for time, code in ends if code)
    causes = [code for _, code in failed if code != LOST_RANK]
    return causes[0] if causes else failed[0][1] if failed else 0


def may_start(history: Sequence[Attempt], restart: int, max_requeues: int) -> Decision | None:
    """Refuse a start of a job that Slurm itself (after a lost node, say) requeued too often; None: go on."""
    if restart > max_requeues:
        return Decision("stop", f"requeued {restart} times, more than max_requeues={max_requeues}")
    stopped = [earlier for earlier in history if earlier.decision == "stop"]
    if stopped and restart > stopped[-1].restart:
        return Decision("stop", f"stopped before: {stopped[-1].reason}")
    return None


def decide(
    history: Sequence[Attempt],
    current: Attempt,
    max_requeues: int,
    terminated: bool = False,
    cancelled: bool = False,
) -> Decision:
    """What follows the end of one attempt.

    Args:
        history: earlier attempts of the same job, oldest first.
        current: the attempt, with exit code (None: the step ended without a word from any node) and step.
        max_requeues: how often the job may be requeued in all.
        terminated: Slurm is ending the job.
        cancelled: the user asked for a checkpoint and the end.
    """
    code, where = current.exit_code, f"step {current.step or 0}"
    said = _in_words(code, current.asked)
    if code == 0:
        return Decision("done", "finished")
    if cancelled:
        return Decision("stop", f"cancelled on request at {where}: {said}")
    if terminated:
        return Decision("leave", f"Slurm is ending the job at {where}: {said}")
    if not _is_interruption(current):
        if code is not None and (code in REAL_ERRORS or not _may_pass(code)):
            return Decision("stop", f"{said} at {where}: another start would not help")
        earlier = [
            attempt for attempt in history if _failed(attempt) and (attempt.step or 0) == (current.step or 0)
        ]
        if earlier:
            return Decision("stop", f"failed twice at {where}: {said}")
    idle = [*history, current][-NO_PROGRESS:]
    if len(idle) == NO_PROGRESS and len({attempt.step or 0 for attempt in idle}) == 1:
        return Decision(
            "stop", f"{said} at {where}: {NO_PROGRESS} starts without a step; is the time too short?"
        )
    if current.restart >= max_requeues:
        return Decision(
            "stop", f"{said} at {where}, and already requeued {current.restart} times (max_requeues)"
        )
    return Decision("requeue", f"{said} at {where}")


def _in_words(code: int | None, asked: bool) -> str:
    if code is not None:
        return f"{meaning(code)} (code {code})"
    return "did not save in the time left" if asked else "ended without a word (a lost node?)"


def _is_interruption(attempt: Attempt) -> bool:
    """Whether it ended because it was asked to: after a checkpoint, or killed before it could take one."""
    if attempt.exit_code == INTERRUPTED:
        return True
    return attempt.asked and (attempt.exit_code is None or attempt.exit_code > 128)


def _failed(attempt: Attempt) -> bool:
    return attempt.ended is not None and attempt.exit_code != 0 and not _is_interruption(attempt)


def _may_pass(code: int) -> bool:
    """Whether a failure can be one of machines, which another start may not meet."""
    return code in (LOST_RANK, HANG, BAD_NODES) or code > 128
