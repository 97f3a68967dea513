"""Ending a run's jobs for good: after a checkpoint, or at once."""

import os
import pwd
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from launcher.run_state import read_run
from launcher.slurm import slurm_commands
from launcher.slurm.attempts import read_attempts, request_cancel
from launcher.slurm.requeue import INTERRUPTED
from launcher.slurm.run_jobs import (
    TRAINING,
    Target,
    kind_of,
    question,
    submissions,
    submitted_id,
    unfinished,
    works_for,
)
from launcher.slurm.slurm_commands import Job, SlurmError

_POLL_SECONDS = 3.0
#: States in which a job has a batch script that can be asked.
_STARTED = ("RUNNING", "SUSPENDED")


class StillRunningError(SlurmError):
    """A job did not end within the time given; it was asked and will end at its next step."""


class NotOwnError(SlurmError):
    """A job of the run is another user's."""


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a container's user without a name
        return str(os.getuid())


@dataclass(frozen=True)
class Cancelled:
    """What was done about one job.

    Attributes:
        job: as it was before.
        asked: it was asked to save first; else it was ended at once.
        step: of the newest checkpoint afterwards; None without one, or for a job that trains nothing.
        unsaved: why it ended without saving although it was asked to; "" otherwise.
    """

    job: Job
    asked: bool
    step: int | None
    unsaved: str = ""


@dataclass(frozen=True)
class Choice:
    """Which of the jobs that a folder names are to be ended.

    Slurm's word counts, not that of the folder: a stranger may have written any id into it, and ids recur.

    Attributes:
        jobs: the user's own for this folder that are not over; those that wait come first.
        others: that work for the folder and belong to another user.
        foreign: that do not work for the folder.
    """

    jobs: list[Job]
    others: list[Job]
    foreign: list[Job]


def jobs_to_cancel(target: Target) -> Choice:
    """Jobs of a folder that are not over, or only the one (or the task) named.

    A task stands for its whole array, the first component for a heterogeneous job.
    """
    ids = [int(line["job_id"]) for line in submissions(target.folder)]
    named = target.jobs() if target.job is not None else slurm_commands.list_jobs(ids) if ids else []
    order = sorted(unfinished(named), key=lambda job: (job.state in _STARTED, -job.het_job_offset, -job.id))
    choice = Choice([], [], [])
    for job in {submitted_id(job): job for job in order}.values():
        if not works_for(job, target.folder):
            choice.foreign.append(job)
        elif job.user != _user():
            choice.others.append(job)
        else:
            choice.jobs.append(job)
    return choice


def cancel_jobs(
    target: Target, jobs: list[Job], at_once: bool, seconds: float, say: Callable[[str], None]
) -> list[Cancelled]:
    """End jobs: one that trains saves a checkpoint first, others are ended at once.

    Args:
        target: the run folder, and the task where only that is meant.
        jobs: of `jobs_to_cancel`.
        at_once: do not ask for a checkpoint.
        seconds: how long to wait for a job that was asked.
        say: receives a line of progress.

    Raises:
        StillRunningError: it was not over in time.
        SlurmError: Slurm refused.
    """
    folder, done, asked = target.folder, [], []
    for job in jobs:
        label = str(submitted_id(job)) if target.task is None else target.label
        trains = kind_of(folder, submitted_id(job)) == TRAINING and job.state in _STARTED
        if at_once or not trains:
            slurm_commands.cancel(label)
            done.append(Cancelled(job, False, None))
            continue
        # The job script reads this and does not requeue; Slurm must not either, should a node fail meanwhile.
        request_cancel(folder, job.id)
        slurm_commands.update_job(label, Requeue="0")
        slurm_commands.cancel(label, "--signal=USR1", "--batch")
        say(f"job {label} was asked to save a checkpoint and end")
        asked.append(job)
    for job in asked:
        wait_until_over(job, seconds)
        checkpoint = read_run(folder, measure_size=False).checkpoint
        step = None if checkpoint is None else checkpoint.step
        done.append(Cancelled(job, True, step, _why_unsaved(folder, job.id)))
    return done


def _why_unsaved(folder: Path, job_id: int) -> str:
    """What the job's last start says of its end; "" where it saved, was done, or had not begun."""
    attempt = next((line for line in reversed(read_attempts(folder)) if line.job_id == job_id), None)
    if attempt is None or attempt.exit_code in (0, INTERRUPTED):
        return ""
    return attempt.reason or "it ended without a word (a lost node?)"


def wait_until_over(job: Job, seconds: float) -> None:
    """Wait until the controller says that a job has ended.

    Raises:
        StillRunningError: it has not, after `seconds`.
    """
    deadline, has_ended = time.monotonic() + seconds, question(submitted_id(job))
    while not has_ended():
        if time.monotonic() > deadline:
            raise StillRunningError(
                f"job {job.id} has not ended {seconds:g} s after it was asked; it ends after the step it is "
                f"in (medvlp logs {job.id}); medvlp cancel {job.id} --now ends it without a checkpoint"
            )
        time.sleep(_POLL_SECONDS)
