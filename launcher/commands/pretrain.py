"""`medvlp pretrain`: train here, on ranks it starts, or as one rank of another launcher; `medvlp config`."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.command_words import split_arguments
from medvlp.ranks import NODE_LAUNCH, LaunchError, detect
from shards.errors import MedvlpError

if TYPE_CHECKING:
    from launcher.placement import Node
    from medvlp.config import Config

logger = logging.getLogger(__name__)

#: Keys that every run sets and no file of `configs/` does; a config is checked without them.
_PLACES = {"data.root", "run.dir"}


def pretrain(
    arguments: Annotated[
        list[str], typer.Argument(metavar="CONFIG|KEY=VALUE", help="YAML files, then overrides")
    ],
    nproc: Annotated[
        int | None,
        typer.Option("--nproc", min=1, help="ranks on this machine; default: one per GPU, else one"),
    ] = None,
    nodes: Annotated[int | None, typer.Option("--nodes", min=1, help="machines of the run")] = None,
    node_rank: Annotated[
        int | None, typer.Option("--node-rank", min=0, help="which of them this is, from 0")
    ] = None,
    meet: Annotated[
        str | None, typer.Option("--meet", help="HOST:PORT of node 0 where all ranks meet")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="refuse a run folder that is not empty")] = False,
) -> None:
    """Pre-train a method on a dataset; an existing run folder is resumed.

    On several machines start the same command on each, with its own --node-rank; in a job of `medvlp submit`
    Slurm says it.

    Exit codes: 0 finished; 75 stopped by a signal after saving (start again
    to resume); 2 config; 3 data; 4 checkpoint or run folder; 5 too many bad
    steps in a row; 6 lost another rank; 7 a rank did not arrive in time;
    128 + n killed by signal n; 1 anything else.
    """
    from launcher.placement import place_node
    from medvlp import config_files, trust
    from medvlp.evaluation import task
    from medvlp.methods.registry import schemas

    place = detect()
    if place.launcher != "none" and (nodes, node_rank, meet) != (None, None, None):
        raise LaunchError(f"--nodes, --node-rank and --meet inside {place.launcher}: leave them out")
    if place.launcher != "none" and nproc is not None and nproc != place.local_world_size:
        raise LaunchError(
            f"--nproc {nproc} inside {place.launcher}, which already runs {place.local_world_size} ranks "
            "here: leave --nproc out"
        )
    files, overrides = split_arguments(arguments)
    config = config_files.load(files, overrides, schemas(), tasks=task.schemas())
    if place.rank == 0:
        trust.remember_config(config)
    if place.launcher != "none":
        raise typer.Exit(_train_rank(config, fresh))
    command = ["pretrain", *arguments, *(["--fresh"] if fresh else [])]
    raise typer.Exit(_train(config, command, nproc, place_node(nodes, node_rank, meet), fresh))


def train_config(config: Config, nproc: int | None = None, fresh: bool = False, apart: bool = False) -> int:
    """Train the run that a checked config describes on this machine; the exit code of `medvlp pretrain`.

    Args:
        config: complete; what is trained stands in it.
        nproc: ranks; None: as `medvlp pretrain`.
        fresh: refuse a run folder that is not empty.
        apart: in processes of its own also with one rank: what an engine took of memory goes with it.
    """
    from launcher.placement import Node
    from medvlp.config_files import to_yaml

    with tempfile.TemporaryDirectory(prefix="medvlp-config-") as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(to_yaml(config), encoding="utf-8")
        command = ["pretrain", str(file), *(["--fresh"] if fresh else [])]
        return _train(config, command, nproc, Node(), fresh, apart)


def _train(
    config: Config, command: list[str], nproc: int | None, node: Node, fresh: bool, apart: bool = False
) -> int:
    """Train as the only rank, or start ranks that run `medvlp COMMAND`; the exit code."""
    from launcher import local
    from medvlp.data.batch_sizes import divide_batch
    from medvlp.prototypes.supervisor import uses_workers
    from medvlp.runs.run_lock import release_after
    from medvlp.training.deepspeed_config import check_device

    ranks, has_cuda = local.ranks_here(nproc)
    divide_batch(config, node.count * ranks)
    check_device(config, "cuda" if has_cuda else "cpu")
    if ranks == node.count == 1 and NODE_LAUNCH not in os.environ and not apart:
        os.environ |= local.library_environment(1, has_cuda, os.environ)
        return _train_rank(config, fresh)
    workers = uses_workers(config.prototypes, has_cuda)
    code = local.launch(command, ranks, has_cuda, workers, node)
    release_after(config.run.dir, os.getpid())
    return code


def _train_rank(config: Config, fresh: bool) -> int:
    """Train as one rank; of errors that several ranks raise, one is shown."""
    from launcher.local import PARENT, die_with_launcher, may_show_error
    from launcher.slurm.slurm_commands import job_is_over
    from medvlp.evaluation.supervised import recipe_of
    from medvlp.runs.errors import AgreedError
    from medvlp.training import run

    die_with_launcher(os.environ)
    try:
        launcher = int(os.environ[PARENT]) if PARENT in os.environ else None
        return run.train(recipe_of(config), fresh, launcher, job_is_over)
    except MedvlpError as error:
        agreed = isinstance(error, AgreedError)
        if (agreed and detect().rank > 0) or not (agreed or may_show_error(error, os.environ)):
            sys.exit(error.exit_code)
        raise


def config(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="CONFIG|KEY=VALUE", help="YAML files, then overrides"),
    ] = None,
    reference: Annotated[bool, typer.Option("--reference", help="print every key with its meaning")] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="print what the run takes of each GPU, and how long it lasts")
    ] = False,
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="for --plan: GPUs of the run")] = 1,
    gpu_memory: Annotated[float, typer.Option("--gpu-memory", min=0.1, help="for --plan: GiB of one")] = 80.0,
    tflops: Annotated[
        float, typer.Option("--tflops", min=0.1, help="for --plan: peak of one in this precision, 10^12/s")
    ] = 989.0,
    mfu: Annotated[
        float, typer.Option("--mfu", min=0.01, max=1, help="for --plan: share of the peak that is reached")
    ] = 0.35,
) -> None:
    """Print the config that these files and overrides give, the reference of all keys, or a plan of memory.

    With --plan the exit code is 2 when train.micro_batch does not fit.
    """
    from medvlp import config_combinations, config_files, config_reference, trust
    from medvlp.evaluation import task
    from medvlp.methods.registry import schemas

    if reference:
        typer.echo(config_reference.reference(schemas(), task.schemas()), nl=False)
        return
    files, overrides = split_arguments(arguments or [])
    tree = config_files.merge(files, overrides, schemas(), tasks=task.schemas())
    missing = config_files.missing(tree)
    if plan and missing:
        raise config_files.ConfigError(f"--plan needs {', '.join(missing)}")
    if unplaced := set(missing) - _PLACES:
        logger.warning("keys are checked one by one only: no value for %s", ", ".join(sorted(unplaced)))
    else:
        given = [*overrides, *(f"{key}=unknown" for key in missing)]
        loaded = config_files.load(files, given, schemas(), unused=trust.KEYS, tasks=task.schemas())
        config_combinations.check_deepspeed(loaded)
        if plan:
            _print_plan(loaded, gpus, gpu_memory, tflops, mfu)
            return
    typer.echo(config_files.to_yaml(tree), nl=False)


def _print_plan(config: Config, gpus: int, memory: float, tflops: float, mfu: float) -> None:
    from medvlp.training.memory_plan import describe, plan_run

    found, samples = plan_run(config, gpus, memory)
    for what, value in describe(found, config, samples, tflops, mfu):
        typer.echo(f"{what:36} {value}")
    if not found.fits:
        raise typer.Exit(2)
