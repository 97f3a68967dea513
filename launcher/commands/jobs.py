"""`medvlp jobs`, `logs` and `cancel`: jobs in the queue beside the progress of their runs."""

import getpass
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from launcher.console import echo, for_tables
from launcher.number_text import duration_text, number_text
from launcher.slurm.run_jobs import (
    TRAINING,
    RunJob,
    Target,
    current_jobs,
    find,
    jobs_of,
    newest_submission,
    question,
    submitted_id,
    unfinished,
)

_COLOURS = {
    "RUNNING": "green", "COMPLETING": "green", "PENDING": "blue", "COMPLETED": "dim", "CANCELLED": "yellow",
    "TIMEOUT": "red", "FAILED": "red", "NODE_FAIL": "red", "OUT_OF_MEMORY": "red",
}  # fmt: skip
_COLUMNS = (
    "job",
    "kind",
    "state",
    "step",
    "epoch",
    "samples/s",
    "loss",
    "ETA",
    "restarts",
    "nodes",
    "folder",
)


def jobs(
    run: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="all jobs ever submitted for this run folder")
    ] = None,
    everybody: Annotated[bool, typer.Option("--all-users", help="not only your own")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="a JSON list for scripts")] = False,
) -> None:
    """List jobs of `medvlp submit`: state, step, speed, loss, time left, restarts, nodes, run folder."""
    if run is not None:
        found = list(jobs_of(find(str(run)).folder))
    else:
        found = list(current_jobs(None if everybody else getpass.getuser()))
    rows = [_values(job) for job in found]
    if as_json:
        echo(json.dumps(rows, indent=1))
        return
    if not rows:
        echo("no jobs of `medvlp submit` are known to Slurm; `medvlp runs` lists runs")
        return
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in _COLUMNS:
        table.add_column(column, overflow="fold")
    for values in rows:
        table.add_row(*_cells(values))
    for_tables(200).print(table)


def _values(entry: RunJob) -> dict[str, Any]:
    """One job as `--json` shows it; numbers of the run only for the job that trains it."""
    job, run = entry.job, entry.run if entry.kind == TRAINING else None
    running, step = entry.state == "RUNNING", run.step if run else None
    live = None if entry.is_over else run
    if run and live is None:  # a later job may have gone on since
        ends = (line for line in run.attempts if line.get("job_id") == entry.submitted)
        step = next(ends, {}).get("step")
    return {
        "job": entry.label,
        "kind": entry.kind,
        "name": job.name if job else (entry.past[-1].name if entry.past else ""),
        "state": entry.state,
        "reason": job.reason if job and job.state == "PENDING" else "",
        "partition": job.partition if job else "",
        "seconds_to_limit": max(0, job.end_time - int(time.time())) if job and running else None,
        "step": step,
        "steps": run.steps if run else None,
        "epoch": live.epoch if live else None,
        "samples_per_second": live.samples_per_second if live and running else None,
        "loss": live.loss if live else None,
        "eta_seconds": live.eta_seconds if live and running else None,
        "run_state": run.state if run else None,
        "restarts": job.restarts if job else max(0, len(entry.past) - 1),
        "nodes": job.nodes if job else (entry.past[-1].nodes if entry.past else ""),
        "folder": str(entry.folder),
    }


def shortest(folder: Path) -> str:
    """The path, from the working directory where it lies below that."""
    here = Path.cwd()
    return str(folder.relative_to(here)) if folder.is_relative_to(here) else str(folder)


def _cells(values: dict[str, Any]) -> tuple[str, ...]:
    state = f"[{_COLOURS.get(values['state'], 'white')}]{values['state']}[/]"
    if values["reason"] not in ("", "None"):
        state += f" {escape(values['reason'])}"
    steps = number_text(values["step"])
    if values["steps"] is not None:
        steps = f"{steps or 0}/{values['steps']}"
    eta = "" if values["eta_seconds"] is None else duration_text(values["eta_seconds"])
    return (
        escape(values["job"]), escape(values["kind"]), state, steps, number_text(values["epoch"]),
        number_text(values["samples_per_second"], 1), number_text(values["loss"], 4), eta,
        str(values["restarts"]), escape(values["nodes"]), escape(shortest(Path(values["folder"]))),
    )  # fmt: skip


def logs(
    target: Annotated[str, typer.Argument(metavar="RUN|JOB", help="run folder (its newest job) or job id")],
    follow: Annotated[
        bool, typer.Option("-f", "--follow", help="show new lines until the job has ended, over requeues")
    ] = False,
    rank: Annotated[
        int | None,
        typer.Option(
            "--rank",
            min=0,
            help='only lines of this rank: all write to one file, those of rank 3 begin with "rank 3" behind '
            "the time, those without a mark are rank 0's",
        ),
    ] = None,
    lines: Annotated[int, typer.Option("-n", "--lines", min=0, help="of the end of each file")] = 40,
) -> None:
    """Show the end of the output of a run's newest job, or of one job; of an array, of each task.

    Of one task as well: 24_3.
    """
    from launcher.slurm import logs as log_reader

    named = find(target)
    if follow and named.job is None:
        named = named._replace(job=newest_submission(named.folder))
    folder, job_id, task = named
    is_over = _end_of(named) if follow else None
    if is_over is not None and job_id is not None:
        log_reader.wait_for_output(folder, job_id, is_over, lambda line: echo(line, err=True), task)
    files = log_reader.log_files(folder, job_id, task)
    position = 0
    for path in files:
        if len(files) > 1:
            echo(f"==> {path} <==")
        shown, position = log_reader.tail(path, lines, rank)
        for line in shown:
            echo(line)
    # Of an array, the last task's output is followed.
    if is_over is not None:
        for line in log_reader.of_rank(log_reader.follow(files[-1], position, is_over), rank):
            echo(line)


def _end_of(named: Target) -> Callable[[], bool]:
    """Asks whether the named job is over, as it is from the beginning where it is none of the folder."""
    if named.job is None or not unfinished(named.jobs()):
        return lambda: True
    return question(named.job, named.task)


def cancel(
    target: Annotated[str, typer.Argument(metavar="RUN|JOB", help="run folder or job id")],
    now: Annotated[bool, typer.Option("--now", help="at once, without a checkpoint")] = False,
    timeout: Annotated[
        float, typer.Option("--timeout", min=0, help="seconds to wait for the checkpoint and the end")
    ] = 600.0,
) -> None:
    """End the jobs of a run, or one job or task (24_3); it can be resumed.

    Jobs that wait or do not train are ended at once. Exit code 4: a job has ended without saving.
    """
    from launcher.slurm.attempts import AttemptError
    from launcher.slurm.cancelling import NotOwnError, cancel_jobs, jobs_to_cancel

    named = find(target)
    folder, chosen = named.folder, jobs_to_cancel(named)
    for job in chosen.foreign:
        echo(f"left out: job {submitted_id(job)} ({job.name}), which {folder} names, is not of it", err=True)
    if not chosen.jobs and not chosen.others:
        echo(f"no job of {folder} waits or runs")
        return
    lost = []
    for ended in cancel_jobs(named, chosen.jobs, now, timeout, lambda line: echo(line, err=True)):
        what = f"job {named.label if named.task is not None else submitted_id(ended.job)} ended"
        if not ended.asked:
            echo(f"{what} ({ended.job.state.lower()} before)")
        elif ended.unsaved:
            older = (
                "there is no checkpoint"
                if ended.step is None
                else f"the newest checkpoint is step {ended.step}"
            )
            lost.append(f"{what} without saving: {ended.unsaved}; {older}")
        elif ended.step is None:
            echo(f"{what}; it had not trained far enough for a checkpoint")
        else:
            echo(f"{what}; step {ended.step} is saved: medvlp resume {folder}")
    others = [
        f"job {submitted_id(job)} of {folder} belongs to {job.user}: not cancelled" for job in chosen.others
    ]
    if lost:
        raise AttemptError("; ".join([*lost, *others]))
    if others:
        raise NotOwnError("; ".join(others))
