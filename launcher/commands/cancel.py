"""`medvlp cancel`: end a run's jobs, after a checkpoint or at once."""

from __future__ import annotations

from typing import Annotated

import typer

from launcher.slurm.run_jobs import find, submitted_id


def cancel(
    target: Annotated[str, typer.Argument(metavar="RUN|JOB", help="run folder or job id")],
    now: Annotated[bool, typer.Option("--now", help="at once, without a checkpoint")] = False,
    timeout: Annotated[
        float, typer.Option("--timeout", min=0, help="seconds to wait for the checkpoint and the end")
    ] = 600.0,
) -> None:
    """End the jobs of a run; it can be resumed. Jobs that wait or do not train are ended at once."""
    from launcher.slurm.cancelling import cancel_jobs, jobs_to_cancel

    folder, job_id = find(target)
    jobs = jobs_to_cancel(folder, job_id)
    if not jobs:
        typer.echo(f"no job of {folder} waits or runs")
        return
    for ended in cancel_jobs(folder, jobs, now, timeout, lambda line: typer.echo(line, err=True)):
        what = f"job {submitted_id(ended.job)} ended"
        if not ended.asked:
            typer.echo(f"{what} ({ended.job.state.lower()} before)")
        elif ended.step is None:
            typer.echo(f"{what}; it had not trained far enough for a checkpoint")
        else:
            typer.echo(f"{what}; step {ended.step} is saved: medvlp resume {folder}")
