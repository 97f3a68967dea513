"""`medvlp doctor`: is everything there that a run needs, here and on every node of a job."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.command_words import split_arguments
from launcher.doctor import results

if TYPE_CHECKING:
    from medvlp.config import Config


def doctor(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="CONFIG|KEY=VALUE", help="of the run: names its folders, dataset, W&B"),
    ] = None,
    run_dir: Annotated[Path | None, typer.Option("--run-dir", help="default: run.dir of the config")] = None,
    data: Annotated[str | None, typer.Option("--data", help="default: data.root of the config")] = None,
    collective: Annotated[
        bool, typer.Option("--collective", help="also run an all-reduce over all nodes or GPUs")
    ] = False,
    cluster: Annotated[
        Path | None, typer.Option("--cluster", help="YAML file of the cluster: partition, time, warning")
    ] = None,
    partition: Annotated[
        str | None, typer.Option("--partition", help="whose limits; default: of this job, or Slurm's default")
    ] = None,
    time: Annotated[str | None, typer.Option("--time", help="time limit the job will ask for")] = None,
    array: Annotated[
        int | None, typer.Option("--array", min=1, help="tasks of an array that will run")
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option("--gpus", min=1, help="of the run; default: of the cluster file, job or machine"),
    ] = None,
    gpu_memory: Annotated[
        float | None, typer.Option("--gpu-memory", min=0.1, help="GiB of one; default: as for --gpus")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object for scripts")] = False,
    bad_nodes: Annotated[
        Path | None, typer.Option("--bad-nodes", help="write the names of bad nodes here, one a line")
    ] = None,
) -> None:
    """Look at software, devices, folders, dataset, W&B and Slurm; inside a job, on each of its nodes.

    Exit codes: 0 no check failed (some may warn); 9 a check failed; 10 checks failed on some nodes of the job
    only, which are named.
    """
    from launcher.doctor.checks import CHECKS, Surroundings

    config = _config(arguments or [])
    here = Surroundings(
        folder=run_dir or Path(config.run.dir if config is not None else "."),
        data=data or (config.data.root if config is not None else None),
        config=config,
        collective=collective,
        cluster=cluster,
        partition=partition,
        time=time,
        array=array,
        gpus=gpus,
        gpu_memory=gpu_memory,
    )
    found = results.examine(CHECKS, here)
    if bad_nodes is not None:
        bad_nodes.write_text("".join(f"{node}\n" for node in results.bad_nodes(found)))
    if as_json:
        typer.echo(results.to_json(found))
    else:
        results.print_results(found)
    results.raise_for(found, here.job_nodes)


def doctor_node(
    token: Path,
    cache: Path | None = None,
    cache_gigabytes: float = 0.0,
    remote_data: Annotated[bool, typer.Option("--remote-data")] = False,
    offload: Annotated[bool, typer.Option("--offload")] = False,
) -> None:
    """One node's part of `medvlp doctor`, started there by srun."""
    from launcher.doctor.checks import Surroundings
    from launcher.doctor.nodes import NodeSurroundings, print_report, report_node

    folder = cache or Surroundings(token.parent).node.cache
    print_report(report_node(token, NodeSurroundings(folder, cache_gigabytes, remote_data, offload)))


def doctor_summary(token: Path, reports: Path, since: float, bad_nodes: Path, names: list[str]) -> None:
    """What the nodes of a job reported before the ranks start; adds to the file of bad nodes.

    Exit codes as `medvlp doctor`.
    """
    from launcher.doctor.nodes import judge_nodes

    lines = reports.read_text(encoding="utf-8", errors="replace").splitlines()
    found = list(judge_nodes(token, lines, names, since))
    results.print_results([result for result in found if result.status != "ok"])
    with bad_nodes.open("a", encoding="utf-8") as file:
        file.writelines(f"{node}\n" for node in results.bad_nodes(found))
    results.raise_for(found, len(names))


def doctor_rank() -> None:
    """One rank's part of `medvlp doctor --collective`."""
    from launcher.doctor.collective import reduce_as_rank

    reduce_as_rank()


def _config(arguments: list[str]) -> Config | None:
    if not arguments:
        return None
    from medvlp import config_files
    from medvlp.evaluation import task
    from medvlp.methods.registry import schemas

    files, overrides = split_arguments(arguments)
    return config_files.load(files, overrides, schemas(), tasks=task.schemas())
