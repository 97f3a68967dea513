"""`medvlp doctor`: is everything there that a run needs, here and on every node of a job."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.command_words import split_arguments
from launcher.doctor import report
from launcher.doctor.findings import Finding, guarded, ok, warn
from launcher.doctor.slurm_limits import check_limits, minutes_of

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
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object for scripts")] = False,
    bad_nodes: Annotated[
        Path | None, typer.Option("--bad-nodes", help="write the names of bad nodes here, one a line")
    ] = None,
) -> None:
    """Look at software, devices, folders, dataset, W&B and Slurm; inside a job, on each of its nodes.

    Exit codes: 0 no check failed (some may warn); 9 a check failed; 10 checks failed on some nodes of the job
    only, which are named.
    """
    from launcher.doctor.collective import check_collective
    from launcher.doctor.dataset import check_dataset
    from launcher.doctor.nodes import check_nodes, inside_job
    from launcher.doctor.storage import check_run_folder
    from launcher.doctor.tracking import check_tracking

    config = _config(arguments or [])
    folder = run_dir or Path(config.run.dir if config is not None else ".")
    root = data or (config.data.root if config is not None else None)
    nodes = inside_job(os.environ)
    findings = guarded("run folder", lambda: check_run_folder(folder))
    if nodes:
        findings += guarded("nodes", lambda: check_nodes(folder, _node_arguments(config, root), os.environ))
    else:
        findings += _this_machine(config, root)
    if collective:
        findings += guarded("all-reduce", lambda: check_collective(dict(os.environ)))
    if root is not None:
        findings += guarded("dataset", lambda: check_dataset(root))
    mode = "auto" if config is None else config.monitor.wandb
    findings += guarded("W&B", lambda: [check_tracking(mode)])
    findings += guarded("slurm", lambda: _slurm(cluster, partition, time, array))
    if bad_nodes is not None:
        bad_nodes.write_text("".join(f"{node}\n" for node in report.bad_nodes(findings)))
    if as_json:
        typer.echo(report.to_json(findings))
    else:
        report.print_findings(findings)
    report.raise_for(findings, nodes)


def doctor_node(
    token: Path,
    cache: Path | None = None,
    cache_gigabytes: float = 0.0,
    remote_data: Annotated[bool, typer.Option("--remote-data")] = False,
) -> None:
    """One node's part of `medvlp doctor`, started there by srun."""
    from launcher.doctor.nodes import print_report, report_node

    print_report(report_node(token, cache or _cache(None)[0], cache_gigabytes, remote_data))


def doctor_summary(token: Path, reports: Path, since: float, bad_nodes: Path, names: list[str]) -> None:
    """What the nodes of a job reported before the ranks start; adds to the file of bad nodes.

    Exit codes as `medvlp doctor`.
    """
    from launcher.doctor.nodes import judge_nodes

    lines = reports.read_text(encoding="utf-8", errors="replace").splitlines()
    findings = list(judge_nodes(token, lines, names, since))
    report.print_findings([finding for finding in findings if finding.status != "ok"])
    with bad_nodes.open("a", encoding="utf-8") as file:
        file.writelines(f"{node}\n" for node in report.bad_nodes(findings))
    report.raise_for(findings, len(names))


def doctor_rank() -> None:
    """One rank's part of `medvlp doctor --collective`."""
    from launcher.doctor.collective import reduce_as_rank

    reduce_as_rank()


def _config(arguments: list[str]) -> Config | None:
    if not arguments:
        return None
    from medvlp import config_files
    from medvlp.methods.registry import schemas

    files, overrides = split_arguments(arguments)
    return config_files.load(files, overrides, schemas())


def _cache(config: Config | None) -> tuple[Path, float]:
    from medvlp.config import DataConfig
    from medvlp.data.cache import cache_folder

    data = DataConfig() if config is None else config.data
    return cache_folder(data), data.cache_gigabytes


def _node_arguments(config: Config | None, root: str | None) -> list[str]:
    from shards.format import is_remote

    cache, gigabytes = _cache(config)
    remote = ["--remote-data"] if root is not None and is_remote(root) else []
    return ["--cache", str(cache), "--cache-gigabytes", str(gigabytes), *remote]


def _this_machine(config: Config | None, root: str | None) -> list[Finding]:
    from launcher.doctor.machine import check_machine
    from launcher.doctor.software import check_software
    from launcher.doctor.storage import check_cache
    from shards.format import is_remote

    remote = root is not None and is_remote(root)
    return [
        *guarded("packages", check_software),
        *guarded("machine", check_machine),
        *guarded("node cache", lambda: [check_cache(*_cache(config), remote)]),
    ]


def _slurm(
    cluster: Path | None, partition: str | None, time: str | None, array: int | None
) -> Iterator[Finding]:
    from launcher.slurm import slurm_commands
    from launcher.slurm.cluster_config import load_cluster
    from shards.errors import UsageError

    if not slurm_commands.is_installed():
        yield ok("slurm", "not installed on this machine")
        return
    try:
        settings, partitions = slurm_commands.configuration(), slurm_commands.partitions()
    except slurm_commands.SlurmError as error:
        yield warn(
            "slurm", f"no cluster answers ({error})", "on a login node: see SLURM_CONF and scontrol ping"
        )
        return
    default = next((name for name, values in partitions.items() if values.get("Default") == "YES"), None)
    site = load_cluster(cluster).sbatch
    name = partition or site.partition or os.environ.get("SLURM_JOB_PARTITION") or default
    if name not in partitions:
        raise UsageError(f"--partition {name}: there are {', '.join(partitions)}")
    yield ok(
        "slurm",
        f"{settings.get('SLURM_VERSION', 'version unknown')}, cluster {settings.get('ClusterName', '?')}",
    )
    limit = time or site.time
    minutes = minutes_of(limit) if limit else None
    yield from check_limits(settings, partitions[name], minutes, site.signal_seconds, array)
