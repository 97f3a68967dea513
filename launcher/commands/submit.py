"""`medvlp submit`: the same runs as jobs of a Slurm cluster."""

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from launcher.command_words import CommandGroup, given_options, options_of_dataclasses, parse, split_arguments
from shards.errors import MedvlpError, UsageError


class PretrainByDefault(CommandGroup):
    """`medvlp submit CONFIG ...` means `medvlp submit pretrain CONFIG ...`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put `pretrain` before arguments that begin with no command of this group."""
        if args and args[0] not in self.commands and args[0] not in ("--help", *ctx.help_option_names):
            args = ["pretrain", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=PretrainByDefault,
    no_args_is_help=True,
    help="Submit to a Slurm cluster: `medvlp submit CONFIG ...` is `medvlp submit pretrain CONFIG ...`.",
)


@dataclass(frozen=True)
class JobOptions:
    """What every submitted job is told on the command line; `slurm` is what of it goes to Slurm."""

    cpus_per_task: Annotated[int | None, typer.Option("--cpus-per-task", min=1, help="CPUs of each node")] = (
        None
    )
    time: Annotated[
        str | None, typer.Option("--time", help="time limit: minutes, HH:MM:SS or D-HH:MM:SS")
    ] = None
    cluster: Annotated[
        Path | None, typer.Option("--cluster", help="YAML file of the cluster's settings (configs/clusters/)")
    ] = None
    partition: Annotated[str | None, typer.Option("--partition", help="as sbatch's")] = None
    account: Annotated[str | None, typer.Option("--account", help="as sbatch's")] = None
    qos: Annotated[str | None, typer.Option("--qos", help="as sbatch's")] = None
    constraint: Annotated[
        str | None, typer.Option("--constraint", help="as sbatch's: features of the nodes")
    ] = None
    reservation: Annotated[str | None, typer.Option("--reservation", help="as sbatch's")] = None
    mem: Annotated[
        str | None, typer.Option("--mem", help="as sbatch's: memory of each node; 0: all of it")
    ] = None
    exclude: Annotated[str | None, typer.Option("--exclude", help="as sbatch's: nodes not to use")] = None
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the job script and submit nothing")] = (
        False
    )

    @property
    def slurm(self) -> dict[str, Any]:
        """Values by the names of `launcher.slurm.render.SlurmRequest`'s attributes; None: not given."""
        return {name: value for name, value in asdict(self).items() if name not in ("cluster", "dry_run")}


@dataclass(frozen=True)
class DependentJobOptions(JobOptions):
    """The same for jobs that may wait for others."""

    dependency: Annotated[
        str | None, typer.Option("--dependency", help="as sbatch's, such as afterok:123")
    ] = None


@dataclass(frozen=True)
class TrainingJobOptions(DependentJobOptions):
    """The same for a training."""

    gpus_per_node: Annotated[
        int | None, typer.Option("--gpus-per-node", min=0, help="GPUs of each node; 0: train on CPUs")
    ] = None
    gpu_memory: Annotated[
        float | None,
        typer.Option(
            "--gpu-memory", min=0.1, help="GiB of one GPU: a run that will not fit it is refused here"
        ),
    ] = None
    exclusive: Annotated[bool, typer.Option("--exclusive", help="whole nodes")] = False
    signal_seconds: Annotated[
        int | None,
        typer.Option("--signal-seconds", min=10, help="save and stop so long before the time limit"),
    ] = None

    @property
    def slurm(self) -> dict[str, Any]:
        """As above; without `--exclusive` the site's setting counts."""
        values = super().slurm | {"exclusive": self.exclusive or None}
        del values["gpu_memory"]
        return values


@app.command()
@options_of_dataclasses
def pretrain(
    context: typer.Context,
    arguments: Annotated[
        list[str], typer.Argument(metavar="CONFIG|KEY=VALUE", help="YAML files, then overrides")
    ],
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="number of nodes")] = 1,
    ranks_per_node: Annotated[
        int | None, typer.Option("--ranks-per-node", min=1, help="default: one per GPU, else one")
    ] = None,
    job_name: Annotated[
        str | None, typer.Option("--job-name", help="default: medvlp- and the run's name")
    ] = None,
    max_requeues: Annotated[
        int | None, typer.Option("--max-requeues", min=0, help="how often the job may be requeued")
    ] = None,
    preflight: Annotated[
        bool, typer.Option("--preflight", help="`medvlp doctor` at every start; bad nodes are left out")
    ] = False,
    serve_prototypes: Annotated[
        str | None,
        typer.Option(
            "--serve-prototypes",
            metavar="OPTIONS",
            help="a second component of the job, on a CPU node: medvlp prototypes serve RUN --follow OPTIONS",
        ),
    ] = None,
    beside: Annotated[
        list[str] | None,
        typer.Option("--beside", help="what the second component asks for otherwise: partition=cpu, mem=8G"),
    ] = None,
    *,
    options: TrainingJobOptions,
) -> None:
    """Submit a pre-training: saved, requeued and resumed until it is done.

    The config is checked here, before anything is queued (exit code 2). Other exit codes: 4 run folder, or a
    job of it is still there; 8 Slurm refused, or is not here.
    """
    from launcher.slurm.cluster_config import load_cluster
    from launcher.slurm.heterogeneous import prototype_server
    from launcher.slurm.render import build_request
    from launcher.slurm.submit import PretrainJob, job_log, submit_pretrain
    from medvlp import trust
    from medvlp.config_files import to_yaml

    site = load_cluster(options.cluster)
    gpus = site.sbatch.gpus_per_node or 0 if options.gpus_per_node is None else options.gpus_per_node
    ranks = ranks_per_node or max(1, gpus)
    if gpus and ranks > gpus:
        raise UsageError(
            f"--ranks-per-node {ranks} with --gpus-per-node {gpus}: a rank needs a GPU of its own"
        )
    config = _checked_config(arguments, nodes * ranks, "cuda" if gpus else "cpu")
    memory = options.gpu_memory or site.sbatch.gpu_memory
    if gpus and memory is not None:
        _refuse_what_does_not_fit(config, nodes * ranks, memory)
    run_dir = Path(config.run.dir)
    name = job_name or f"medvlp-{config.run.name or run_dir.name}"
    server = None if serve_prototypes is None else serving_words(run_dir, shlex.split(serve_prototypes))
    job = PretrainJob(
        build_request(site, job_log(run_dir), name, nodes, options.slurm),
        site,
        run_dir,
        to_yaml(config),
        ranks,
        site.sbatch.max_requeues if max_requeues is None else max_requeues,
        preflight,
        prototype_server(site, run_dir, server, options.slurm, beside),
        trust.words(config),
    )
    if options.dry_run:
        typer.echo(job.script(), nl=False)
        return
    words = ["submit", "pretrain", *arguments, *given_options(context)]
    job_id = submit_pretrain(job, words)
    trust.remember_config(config)
    trust.remember("submission", words)
    typer.echo(f"submitted job {job_id}: {nodes} x {ranks} ranks; run folder {run_dir}")
    print_follow_up(run_dir)


def serving_words(folder: Path, options: Sequence[str]) -> list[str]:
    """The words behind `medvlp` that serve a run's prototypes from a job, while it trains or not.

    Raises:
        Exception: click's, for an option that `medvlp prototypes serve` does not have.
    """
    from launcher.commands import prototypes

    words = ["serve", str(folder), "--follow", *options]
    parse(prototypes.app, words)
    return ["prototypes", *words]


def print_follow_up(run_dir: Path) -> None:
    """The commands that follow a job."""
    typer.echo(f"  medvlp jobs\n  medvlp logs {run_dir} -f\n  medvlp cancel {run_dir}")


def _refuse_what_does_not_fit(config: Any, ranks: int, memory: float) -> None:
    """Plan the run on GPUs of `memory` GiB.

    Raises:
        ConfigError: it does not fit.
    """
    from medvlp.config_files import ConfigError
    from medvlp.training.memory_plan import plan_run, refusal

    try:
        plan, _ = plan_run(config, ranks, memory)
    except MedvlpError as error:  # what the nodes see need not be seen here
        typer.echo(f"the memory of the GPUs is not planned, because here {error}", err=True)
        return
    if (reason := refusal(plan)) is not None:
        raise ConfigError(f"{reason}. --gpu-memory or the cluster file says what there is")


def _checked_config(arguments: list[str], ranks: int, device: str) -> Any:
    """The config that `medvlp pretrain` would accept on so many ranks; `run.dir` made absolute."""
    from medvlp import config_files
    from medvlp.data.batch_sizes import divide_batch
    from medvlp.evaluation import task
    from medvlp.methods.registry import schemas
    from medvlp.training.deepspeed_config import check_device

    files, overrides = split_arguments(arguments)
    config = config_files.load(files, overrides, schemas(), tasks=task.schemas())
    divide_batch(config, ranks)
    check_device(config, device, here=False)
    config.run.dir = str(Path(config.run.dir).absolute())
    return config
