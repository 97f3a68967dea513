"""`medvlp submit prototypes RUN`: the read-only prototype server as a small job of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launcher import command_words
from launcher.commands import submit as options
from medvlp.training.errors import RunFolderError

#: For `command`: what is not an option of submitting is one of serving.
SETTINGS = {"ignore_unknown_options": True}


def prototypes(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(metavar="RUN", help="run folder; it may be training")],
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="OPTION", help="of `medvlp prototypes serve`, such as --port 50051"),
    ] = None,
    time: options.Time = None,
    cluster: options.Cluster = None,
    partition: options.Partition = None,
    account: options.Account = None,
    qos: options.Qos = None,
    constraint: options.Constraint = None,
    reservation: options.Reservation = None,
    mem: options.Memory = None,
    exclude: options.Exclude = None,
    dependency: options.Dependency = None,
    cpus_per_task: options.CpusPerTask = None,
    dry_run: options.DryRun = False,
) -> None:
    """Serve a run's clusters from a job, following the run's checkpoints while it trains.

    The server listens on loopback of its node unless told otherwise (`--host`, with a certificate).
    """
    from launcher.commands import prototypes as prototypes_command
    from launcher.run_state import is_run_folder
    from launcher.slurm.cluster_config import load_cluster
    from launcher.slurm.command_jobs import CommandJob, output_pattern, submit_command
    from launcher.slurm.submit import build_request

    folder = run.absolute()
    if not is_run_folder(folder):
        raise RunFolderError(f"{run} is no run folder, and no run was submitted to it")
    serving = ["serve", str(folder), "--follow", *(words or [])]
    command_words.parse(prototypes_command.app, serving)
    given = {
        "time": time, "partition": partition, "account": account, "qos": qos, "constraint": constraint,
        "reservation": reservation, "mem": mem, "exclude": exclude, "cpus_per_task": cpus_per_task,
        "dependency": dependency, "gpus_per_node": 0,
    }  # fmt: skip
    site = load_cluster(cluster)
    request = build_request(site, output_pattern(folder, False), f"medvlp-serve-{folder.name}", 1, given)
    job = CommandJob("prototypes", folder, request, site, [["prototypes", *serving]])
    if dry_run:
        typer.echo(job.script(), nl=False)
        return
    recorded = ["submit", "prototypes", str(folder), *(words or []), *command_words.given_options(context)]
    job_id = submit_command(job, recorded)
    typer.echo(f"submitted job {job_id}, which serves the prototypes of {folder}")
    typer.echo(f"  medvlp logs {job_id} -f  # says its address")
    typer.echo(f"  medvlp cancel {job_id}")
