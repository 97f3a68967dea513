"""`medvlp attempt`: what a job script calls before and after the training. Not meant for people."""

from pathlib import Path
from typing import Annotated

import typer

from launcher.command_words import CommandGroup

app = typer.Typer(cls=CommandGroup, no_args_is_help=True, help="Called by job scripts.")

Run = Annotated[Path, typer.Argument(metavar="RUN")]
MaxRequeues = Annotated[int, typer.Option("--max-requeues", min=0)]


@app.command()
def start(run: Run, max_requeues: MaxRequeues) -> None:
    """Note this start of the job; fails where another one is not allowed."""
    from launcher.slurm.attempts import start_attempt

    attempt = start_attempt(run, max_requeues)
    after = f", after step {attempt.step}" if attempt.step else ""
    typer.echo(
        f"medvlp: start {attempt.restart + 1} of job {attempt.job_id} on {attempt.nodes}{after}", err=True
    )


@app.command()
def end(
    run: Run,
    max_requeues: MaxRequeues,
    exit_code: Annotated[int, typer.Option("--exit-code", help="of srun")],
    asked: Annotated[int, typer.Option("--asked", help="1: Slurm gave its warning")] = 0,
    terminated: Annotated[int, typer.Option("--terminated", help="1: Slurm is ending the job")] = 0,
) -> None:
    """Print `done`, `requeue`, `stop` or `leave`, and the exit code of the job.

    The reason goes to standard error.
    """
    from launcher.slurm.attempts import end_attempt

    decision, code = end_attempt(run, exit_code, max_requeues, bool(asked), bool(terminated))
    typer.echo(f"medvlp: {decision.action}: {decision.reason}", err=True)
    typer.echo(f"{decision.action} {code}")
