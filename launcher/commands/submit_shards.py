"""`medvlp submit shards build ...`: an array builds the parts of a dataset, a job merges them."""

from typing import Annotated

import typer

from launcher import command_words
from launcher.commands import shards as shards_command
from launcher.commands.submit import DependentJobOptions
from shards.errors import UsageError

#: For `command`: what is not an option of submitting is one of building.
SETTINGS = {"ignore_unknown_options": True}


@command_words.options_of_dataclasses
def shards(
    context: typer.Context,
    words: Annotated[
        list[str],
        typer.Argument(metavar="build SOURCE ...", help="as behind `medvlp shards`, without --part"),
    ],
    parts: Annotated[int, typer.Option("--parts", min=1, help="tasks of the array")],
    at_once: Annotated[
        int | None, typer.Option("--at-once", min=1, help="tasks that may run at the same time; default: all")
    ] = None,
    *,
    options: DependentJobOptions,
) -> None:
    """Build a dataset by an array of jobs; a dependent job merges the parts.

    The result is that of `medvlp shards build`, byte for byte. A part that failed is built by submitting the
    same command again: what is finished stays.
    """
    from launcher.slurm.cluster_config import load_cluster
    from launcher.slurm.command_jobs import CommandJob, after, submit_command
    from launcher.slurm.render import build_request
    from launcher.slurm.submit import job_log

    build = command_words.parse(shards_command.app, words)
    if "out" not in build.values:
        raise UsageError("medvlp submit shards: only `build` runs as an array")
    if build.values.get("part") is not None:
        raise UsageError("--part is the array's business: give --parts N")
    site, folder = load_cluster(options.cluster), build.values["out"].absolute()
    given = options.slurm | {"gpus_per_node": 0}
    workers = (
        ["--workers", str(options.cpus_per_task)]
        if options.cpus_per_task and "workers" not in build.given
        else []
    )
    request = build_request(site, job_log(folder, True), f"medvlp-shards-{folder.name}", 1, given)
    array = CommandJob("shards", folder, request, site, [["shards", *words, *workers]], parts, at_once)
    if options.dry_run:
        typer.echo(array.script(), nl=False)
        return
    array_id = submit_command(array, ["submit", "shards", *words, *command_words.given_options(context)])
    merging = ["shards", "merge", str(folder), "--max-rejected", str(build.values["max_rejected"])]
    merge_request = build_request(
        site, job_log(folder), f"medvlp-merge-{folder.name}", 1, given | after([array_id])
    )
    merge_id = submit_command(CommandJob("merge", folder, merge_request, site, [merging]), merging)
    typer.echo(f"submitted array {array_id} of {parts} parts, and job {merge_id} that merges them: {folder}")
    typer.echo(f"  medvlp jobs {folder}")
    typer.echo(f"  medvlp logs {merge_id} -f")
