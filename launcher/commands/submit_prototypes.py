"""`medvlp submit prototypes RUN`: the read-only prototype server as a small job of its own."""

from pathlib import Path
from typing import Annotated

import typer

from launcher import command_words
from launcher.commands.submit import DependentJobOptions, serving_words
from medvlp.runs.errors import RunFolderError

#: For `command`: what is not an option of submitting is one of serving.
SETTINGS = {"ignore_unknown_options": True}


@command_words.options_of_dataclasses
def prototypes(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(metavar="RUN", help="run folder; it may be training")],
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="OPTION", help="of `medvlp prototypes serve`, such as --port 50051"),
    ] = None,
    *,
    options: DependentJobOptions,
) -> None:
    """Serve a run's clusters from a job, following the run's checkpoints while it trains.

    The server listens on loopback of its node unless told otherwise (`--host`, with a certificate).
    """
    from launcher.run_state import is_run_folder
    from launcher.slurm.cluster_config import load_cluster
    from launcher.slurm.command_jobs import CommandJob, submit_command
    from launcher.slurm.render import build_request
    from launcher.slurm.submit import job_log

    folder = run.absolute()
    if not is_run_folder(folder):
        raise RunFolderError(f"{run} is no run folder, and no run was submitted to it")
    command = serving_words(folder, words or [])
    given, site = options.slurm | {"gpus_per_node": 0}, load_cluster(options.cluster)
    request = build_request(site, job_log(folder), f"medvlp-serve-{folder.name}", 1, given)
    job = CommandJob("prototypes", folder, request, site, [command])
    if options.dry_run:
        typer.echo(job.script(), nl=False)
        return
    recorded = ["submit", "prototypes", str(folder), *(words or []), *command_words.given_options(context)]
    job_id = submit_command(job, recorded)
    typer.echo(f"submitted job {job_id}, which serves the prototypes of {folder}")
    typer.echo(f"  medvlp logs {job_id} -f  # says its address")
    typer.echo(f"  medvlp cancel {job_id}")
