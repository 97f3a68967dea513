"""`RUN/slurm/attempts.jsonl`: one line for every start of a job's batch script, and how it ended."""

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from launcher.json_lines import newest, newest_first
from launcher.run_state import ATTEMPTS, METRICS, SLURM_FOLDER
from launcher.slurm.requeue import Attempt, Decision, decide, first_cause, may_start
from shards.atomic import atomic_write
from shards.errors import DataError, MedvlpError
from shards.strict_json import JsonError, parse_json, read_limited, to_record

#: Folder, set by the job script, in which each node's launcher leaves its exit code.
NODE_EXITS = "MEDVLP_NODE_EXITS"
#: A file of this name in RUN/slurm holds the id of the job whose end, after a checkpoint, the user asked for.
CANCEL_REQUEST = "cancel-requested"
#: Codes that srun gives only when a task did.
SAID_BY_RANKS = frozenset({0, 2, 3, 4, 5, 9, 10, 75})


#: Largest file of a node's exit, in bytes.
_EXIT_LIMIT = 1 << 12


@dataclasses.dataclass(frozen=True)
class _NodeExit:
    time: float
    code: int


class AttemptError(MedvlpError):
    """The record of a job's starts cannot be read or written, or forbids another start."""

    exit_code = 4


def read_attempts(run_dir: Path) -> list[Attempt]:
    """All attempts of a run's jobs, oldest first; lines that are none are passed over.

    Raises:
        AttemptError: the file is there and cannot be read.
    """
    path = run_dir / SLURM_FOLDER / ATTEMPTS
    names = {item.name for item in dataclasses.fields(Attempt)}
    needed = {"job_id", "restart", "nodes", "started"}
    try:
        lines = list(newest_first(path))
    except OSError as error:
        raise AttemptError(f"{path} cannot be read: {error.strerror or error}") from error
    return [Attempt(**line) for line in reversed(lines) if needed <= line.keys() <= names]


def start_attempt(run_dir: Path, max_requeues: int, environment: Mapping[str, str] = os.environ) -> Attempt:
    """Note that the batch script of this job starts.

    Raises:
        AttemptError: the run folder cannot be read or written, or the job was requeued too often.
    """
    attempts = read_attempts(run_dir)
    attempt = Attempt(
        job_id=int(environment["SLURM_JOB_ID"]),
        restart=int(environment.get("SLURM_RESTART_COUNT", "0")),
        nodes=environment.get("SLURM_JOB_NODELIST", ""),
        started=_now(),
        step=_last_step(run_dir),
    )
    earlier = [other for other in attempts if other.job_id == attempt.job_id]
    refused = may_start(earlier, attempt.restart, max_requeues)
    if refused is not None:
        ended = dataclasses.replace(attempt, ended=_now(), decision=refused.action, reason=refused.reason)
        _write(run_dir, [*attempts, ended])
        raise AttemptError(f"job {attempt.job_id} does not start again: {refused.reason}")
    _write(run_dir, [*attempts, attempt])
    return attempt


def end_attempt(
    run_dir: Path,
    exit_code: int,
    max_requeues: int,
    asked: bool,
    terminated: bool,
    environment: Mapping[str, str] = os.environ,
) -> tuple[Decision, int]:
    """Note how the current attempt ended and decide what follows.

    Args:
        exit_code: of srun; it counts when no node left its own.
        asked, terminated: which signals the batch script got.

    Returns:
        The decision, and the exit code of the job.

    Raises:
        AttemptError: the run folder cannot be read or written, so that nothing would bound requeues.
    """
    job_id, restart = int(environment["SLURM_JOB_ID"]), int(environment.get("SLURM_RESTART_COUNT", "0"))
    attempts = read_attempts(run_dir)
    index = next(
        (place for place, other in reversed(list(enumerate(attempts)))
         if (other.job_id, other.restart) == (job_id, restart)), None,
    )  # fmt: skip
    if index is None:
        raise AttemptError(
            f"{run_dir / SLURM_FOLDER / ATTEMPTS} lost the start of this attempt: nothing bounds requeues"
        )
    cause = first_cause(_node_exits(environment.get(NODE_EXITS)))
    if not cause:  # a node can end without a word: killed, or refused its command line before it had ranks
        cause = exit_code if exit_code in SAID_BY_RANKS else None
    attempt = dataclasses.replace(
        attempts[index], ended=_now(), exit_code=cause, step=_last_step(run_dir), asked=asked
    )
    earlier = [other for other in attempts[:index] if other.job_id == job_id]
    decision = decide(earlier, attempt, max_requeues, terminated, _is_cancelled(run_dir, job_id))
    attempts[index] = dataclasses.replace(attempt, decision=decision.action, reason=decision.reason)
    _write(run_dir, attempts)
    if NODE_EXITS in environment:
        shutil.rmtree(environment[NODE_EXITS], ignore_errors=True)
    return decision, exit_code if cause is None else cause


def note_node_exit(node: int, exit_code: int, environment: Mapping[str, str] = os.environ) -> None:
    """Leave a node's exit code for the batch script; quietly, for a full disk must not change that code."""
    if NODE_EXITS not in environment:
        return
    folder = Path(environment[NODE_EXITS])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(
            folder / f"node-{node:04d}.json", json.dumps({"time": time.time(), "code": exit_code}).encode()
        )
    except (OSError, DataError):
        return


def request_cancel(run_dir: Path, job_id: int) -> None:
    """Note that the job is to end for good at its next checkpoint; the signal for that is sent by the caller.

    Raises:
        AttemptError: the run folder cannot be written.
    """
    try:
        atomic_write(run_dir / SLURM_FOLDER / CANCEL_REQUEST, str(job_id).encode())
    except (OSError, DataError) as error:
        raise AttemptError(f"cannot note the request in {run_dir}: {error}") from error


def _is_cancelled(run_dir: Path, job_id: int) -> bool:
    try:
        return (run_dir / SLURM_FOLDER / CANCEL_REQUEST).read_text(encoding="utf-8").strip() == str(job_id)
    except OSError:
        return False


def _node_exits(folder: str | None) -> list[tuple[float, int]]:
    ends = []
    for path in sorted(Path(folder).glob("node-*.json")) if folder else []:
        try:
            entry = to_record(parse_json(read_limited(path, _EXIT_LIMIT), _EXIT_LIMIT), _NodeExit)
            ends.append((entry.time, entry.code))
        except (OSError, JsonError):
            continue
    return ends


def _last_step(run_dir: Path) -> int | None:
    try:
        line = newest(run_dir / METRICS)
    except OSError:
        return None
    return int(line["step"]) if line and isinstance(line.get("step"), int) else None


def _write(run_dir: Path, attempts: list[Attempt]) -> None:
    """Replace the file as a whole: one batch script at a time writes it."""
    lines = "".join(json.dumps(dataclasses.asdict(attempt)) + "\n" for attempt in attempts)
    path = run_dir / SLURM_FOLDER / ATTEMPTS
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, lines.encode())
    except (OSError, DataError) as error:
        raise AttemptError(
            f"cannot note this start of the job in {path}: {error}; mend that and submit again"
        ) from error


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
