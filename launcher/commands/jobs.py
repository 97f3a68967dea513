"""`medvlp jobs`: jobs in the queue beside the progress of their runs."""

from __future__ import annotations

import getpass
import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from launcher.figures import duration_text, number_text
from launcher.slurm.run_jobs import TRAINING, RunJob, current_jobs, find, jobs_of

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
        folder, _ = find(str(run))
        found = list(jobs_of(folder))
    else:
        found = list(current_jobs(None if everybody else getpass.getuser()))
    rows = [_values(job) for job in found]
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    if not rows:
        typer.echo("no jobs of `medvlp submit` are known to Slurm; `medvlp runs` lists runs")
        return
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in _COLUMNS:
        table.add_column(column, overflow="fold")
    for values in rows:
        table.add_row(*_cells(values))
    # A pipe or log file has no width.
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(table)


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
