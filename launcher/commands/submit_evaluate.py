"""`medvlp submit evaluate RUN ...`: evaluations as an array, and a job that joins and compares them."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from launcher import command_words
from launcher.command_words import split_arguments
from launcher.commands.evaluate import Fractions, Seeds, unit_words
from launcher.commands.submit import JobOptions
from launcher.run_state import CONFIG, PARTS_FOLDER, SLURM_FOLDER
from medvlp.runs.errors import RunFolderError
from shards.errors import UsageError


@command_words.options_of_dataclasses
def evaluate(
    context: typer.Context,
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN... [CONFIG|KEY=VALUE]...",
            help="run folders, then YAML files and overrides over their configs",
        ),
    ],
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            help="repeat it for an array over tasks; default: all that train no network, one after the other",
        ),
    ] = None,
    fraction: Fractions = None,
    seed: Seeds = None,
    nproc: Annotated[
        int | None, typer.Option("--nproc", min=1, help="ranks of a task that train what it trains")
    ] = None,
    data: Annotated[str | None, typer.Option("--data", help="dataset; default: each run's own")] = None,
    split: Annotated[str | None, typer.Option("--split", help="split to evaluate")] = None,
    after_job: Annotated[
        int | None, typer.Option("--after", help="start when this job (a training) has ended well")
    ] = None,
    gpus_per_node: Annotated[int, typer.Option("--gpus-per-node", min=0, help="of each task, 0 or 1")] = 0,
    *,
    options: JobOptions,
) -> None:
    """Evaluate runs by an array over runs, tasks and their units; a dependent job joins and compares."""
    from launcher.slurm import evaluation_parts
    from launcher.slurm.cluster_config import load_cluster
    from launcher.slurm.command_jobs import CommandJob, after, submit_command
    from launcher.slurm.render import build_request
    from launcher.slurm.submit import job_log

    runs, files, overrides = _split(arguments)
    overrides += unit_words(task or (), fraction, seed)
    site, folder, given = load_cluster(options.cluster), runs[0], options.slurm
    common = [
        *map(str, files),
        *overrides,
        *(["--data", data] if data else []),
        *(["--split", split] if split else []),
    ]
    common += [] if nproc is None else ["--nproc", str(nproc)]
    commands: list[list[str]] = []
    finished: list[list[str]] = []
    for run in runs:
        for name, words in _parts(run, files, overrides, task or ()).items():
            out = ["--out", str(run / PARTS_FOLDER / f"{name}.json")] if task else []
            commands.append(["evaluate", str(run), *common, *words, *out])
            finished.append(finished_units(run, words))
    first = {"gpus_per_node": gpus_per_node} | (after([after_job]) if after_job is not None else {})
    is_array = len(commands) > 1
    request = build_request(
        site, job_log(folder, is_array), f"medvlp-evaluate-{folder.name}", 1, given | first
    )
    job = CommandJob("evaluate", folder, request, site, commands, finished=finished)
    if options.dry_run:
        typer.echo(job.script(), nl=False)
        return
    record = ["submit", "evaluate", *arguments, *command_words.given_options(context)]
    job_id = evaluation_parts.submit_array(job, runs, record) if task else submit_command(job, record)
    summary = ["compare", *map(str, runs), *(["--join"] if task else [])]
    summary_request = build_request(
        site, job_log(folder), f"medvlp-compare-{folder.name}", 1,
        given | {"gpus_per_node": 0} | after([job_id]),
    )  # fmt: skip
    summary_id = submit_command(CommandJob("compare", folder, summary_request, site, [summary]), summary)
    evaluation_parts.note(folder, runs[1:] if task else [], summary_id)
    what = f"array {job_id} of {len(commands)} evaluations" if is_array else f"evaluation {job_id}"
    typer.echo(f"submitted {what}, and job {summary_id} that shows the results")
    typer.echo(f"  medvlp logs {summary_id} -f")


def finished_units(run: Path, part: Sequence[str]) -> list[str]:
    """Words of `find` for the finished units of a part and the checkpoints of what it trains.

    Args:
        part: its options: none for all tasks, --task, and --unit.
    """
    from medvlp.evaluation.report.results import FOLDER, RESULT
    from medvlp.runs.manifest import MANIFEST

    named = dict(zip(part[::2], part[1::2], strict=True))
    folder = run / FOLDER / named.get("--task", "")
    # From the first folder on, whose own name may look like a unit's; `find` takes it for a pattern.
    literal = re.sub(r"[\\*?\[]", r"\\\g<0>", str(folder))
    within = ["-path", f"{literal}/{named['--unit']}-*/*"] if "--unit" in named else []
    return [str(folder), *within, "(", "-name", RESULT, "-o", "-name", MANIFEST, ")"]


def _split(arguments: Sequence[str]) -> tuple[list[Path], list[Path], list[str]]:
    """Run folders, YAML files and overrides."""
    from launcher.run_state import is_run_folder

    paths, overrides = split_arguments(arguments)
    files = [path.absolute() for path in paths if path.is_file()]
    runs = [path.absolute() for path in paths if not path.is_file()]
    if not runs:
        raise UsageError("name at least one run folder")
    for run in runs:
        if not is_run_folder(run):
            raise RunFolderError(f"{run} is no run folder, and no run was submitted to it")
    return runs, files, overrides


def _parts(
    run: Path, files: Sequence[Path], overrides: Sequence[str], names: Sequence[str]
) -> dict[str, list[str]]:
    """Name of each part of an evaluation -> the options for a task or one unit of it; none: all."""
    from omegaconf import OmegaConf

    from medvlp import config_files
    from medvlp.evaluation.task import check_used, schemas, tasks
    from medvlp.methods import registry

    known = tasks()
    for name in names:
        if name not in known:
            raise UsageError(f"--task {name}: there are {', '.join(known)}")
    check_used(files, overrides, names)
    if not names:
        return {"": []}
    # A run that has only been submitted has the config of its job.
    own = [file for file in (run / CONFIG, run / SLURM_FOLDER / CONFIG) if file.is_file()]
    tree = config_files.merge([*own[:1], *files], overrides, registry.schemas(), schemas())
    parts = {}
    for name in names:
        units = known[name](OmegaConf.to_object(tree.evaluation.tasks[name])).units()
        for unit in units:
            if len(units) == 1:
                parts[name] = ["--task", name]
            else:
                parts[f"{name}.{unit.name}"] = ["--task", name, "--unit", unit.name]
    return parts
