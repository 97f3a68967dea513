"""`medvlp runs`: every run below a folder, and how it stands."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from launcher.console import echo, for_tables
from launcher.number_text import bytes_text, duration_text, number_text
from launcher.run_state import RunState, find_runs, read_run
from medvlp.runs.errors import RunFolderError
from shards.errors import MedvlpError

COLOURS = {"finished": "green", "running": "cyan", "queued": "blue", "interrupted": "yellow", "failed": "red"}


class UploadError(MedvlpError):
    """W&B did not take the parts of a run."""


def runs(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="folder of runs, or one run folder")
    ] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="a JSON list for scripts")] = False,
    sizes: Annotated[bool, typer.Option("--sizes/--no-sizes", help="add up the sizes of all files")] = True,
    sync: Annotated[
        bool, typer.Option("--sync", help="upload to W&B what runs that are not running have logged offline")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="with --sync: only say what would go")] = False,
) -> None:
    """List runs: method, state, step, best metric, newest checkpoint, W&B run, size."""
    from launcher.slurm.run_jobs import jobs_by_folder, trains, unfinished

    if not folder.is_dir():
        raise RunFolderError(f"{folder} is no folder; name the one that holds your runs")
    jobs = jobs_by_folder()
    found = []
    for path in find_runs(folder):
        try:
            of_run = [job for job in (jobs or {}).get(path.resolve(), []) if trains(job, path)]
            states = {job.state for job in unfinished(of_run)}
            run = read_run(path, bool(states - {"PENDING"}) or None, sizes)
        except OSError as error:  # somebody else's
            echo(f"{path}: left out, {error.filename} cannot be read: {error.strerror}", err=True)
            continue
        found.append(replace(run, state="queued", reason="") if states == {"PENDING"} else run)
    if sync:
        _upload(found, dry_run)
        return
    if as_json:
        echo(json.dumps([_values(run) for run in found], indent=1))
        return
    table = Table(title=escape(f"runs in {folder}"), title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("run", "method", "state", "step", "best", "checkpoint", "W&B", "size"):
        table.add_column(column, justify="right" if column in ("step", "size") else "left", overflow="fold")
    for run in found:
        table.add_row(*_row(run, folder))
    for_tables(160).print(table)


def _upload(found: Sequence[RunState], dry_run: bool) -> None:
    """Upload the offline parts of runs; W&B's own command orders those of one run and passes over sent ones.

    Raises:
        UploadError: it failed; what was sent by then is not sent again.
    """
    parts: list[Path] = []
    for run in found:
        if run.state == "running":
            echo(f"{run.folder}: still running, left out")
        else:
            for part in sorted(run.folder.glob("wandb/offline-run-*")):
                if _is_begun(part):
                    parts.append(part)
                else:
                    echo(f"{part}: holds nothing (its machine was lost before W&B had written), left out")
    if not parts:
        echo("nothing was logged offline")
        return
    command = [sys.executable, "-m", "wandb", "sync", "--yes", *(["--dry-run"] if dry_run else [])]
    code = subprocess.run([*command, *map(str, parts)], stdin=subprocess.DEVNULL).returncode
    if code != 0:
        raise UploadError(
            f"wandb sync ended with code {code}; after its message is mended, the same command goes on"
        )


#: Of a `.wandb` file: what stands before its first record, in bytes.
_WANDB_HEADER = 7


def _is_begun(part: Path) -> bool:
    """Whether an offline part has records; one that has not would end the upload of those behind it."""
    return any(file.stat().st_size > _WANDB_HEADER for file in part.glob("run-*.wandb"))


def _row(run: RunState, root: Path) -> tuple[str, ...]:
    name = str(run.folder.relative_to(root)) if run.folder != root else str(root)
    colour = COLOURS.get(run.state, "white")
    state = f"[{colour}]{run.state}[/]" + (f" {escape(run.reason)}" if run.reason else "")
    if run.state == "running" and run.eta_seconds is not None:
        state += f" {duration_text(run.eta_seconds)} left"
    steps = (
        f"{number_text(run.step)}/{number_text(run.steps)}"
        if run.steps is not None
        else number_text(run.step)
    )
    best = "" if run.best is None else f"{run.best_metric} {run.best:.4g}"
    checkpoint = (
        "" if run.checkpoint is None else f"{run.checkpoint.step} ({bytes_text(run.checkpoint.bytes)})"
    )
    size = bytes_text(run.bytes) if run.bytes else ""
    run_id = escape(run.wandb_run_id or "")
    return escape(name), escape(run.method), state, steps, escape(best), checkpoint, run_id, size


def _values(run: RunState) -> dict[str, Any]:
    values = asdict(run) | {"eta_seconds": run.eta_seconds, "wandb_run_id": run.wandb_run_id}
    return values | {"folder": str(run.folder)}
