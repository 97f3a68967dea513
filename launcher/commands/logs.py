"""`medvlp logs`: what a run's jobs print."""

from __future__ import annotations

from typing import Annotated

import typer

from launcher.slurm.run_jobs import find


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
    """Show the end of the output of a run's newest job, or of one job; of an array, of each task."""
    from launcher.slurm import logs as log_reader
    from launcher.slurm import run_jobs, slurm_commands

    folder, job_id = find(target)
    if follow and job_id is None:
        job_id = run_jobs.newest_submission(folder)

    def is_over() -> bool:
        return not run_jobs.unfinished(slurm_commands.list_jobs([job_id] if job_id is not None else []))

    if follow and job_id is not None:
        log_reader.wait_for_output(folder, job_id, is_over, lambda line: typer.echo(line, err=True))
    files = log_reader.log_files(folder, job_id)
    position = 0
    for path in files:
        if len(files) > 1:
            typer.echo(f"==> {path} <==")
        shown, position = log_reader.tail(path, lines, rank)
        for line in shown:
            typer.echo(log_reader.without_controls(line))
    # Of an array, the last task's output is followed.
    for line in log_reader.of_rank(log_reader.follow(files[-1], position, is_over), rank) if follow else ():
        typer.echo(log_reader.without_controls(line))
