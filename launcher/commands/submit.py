"""`medvlp submit`: the same runs as jobs of a Slurm cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from launcher.arguments import split_arguments
from launcher.command_words import given_options
from shards.errors import UsageError


class PretrainByDefault(TyperGroup):
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

#: Options that go to sbatch as they are.
_SLURM_OPTIONS = (
    "gpus_per_node", "cpus_per_task", "time", "partition", "account", "qos", "constraint", "reservation",
    "mem", "exclude", "dependency", "signal_seconds",
)  # fmt: skip

Cluster = Annotated[
    Path | None, typer.Option("--cluster", help="YAML file of the cluster's settings (configs/clusters/)")
]
Time = Annotated[str | None, typer.Option("--time", help="time limit: minutes, HH:MM:SS or D-HH:MM:SS")]
Partition = Annotated[str | None, typer.Option("--partition", help="as sbatch's")]
Account = Annotated[str | None, typer.Option("--account", help="as sbatch's")]
Qos = Annotated[str | None, typer.Option("--qos", help="as sbatch's")]
Constraint = Annotated[str | None, typer.Option("--constraint", help="as sbatch's: features of the nodes")]
Reservation = Annotated[str | None, typer.Option("--reservation", help="as sbatch's")]
Memory = Annotated[str | None, typer.Option("--mem", help="as sbatch's: memory of each node; 0: all of it")]
Exclude = Annotated[str | None, typer.Option("--exclude", help="as sbatch's: nodes not to use")]
Dependency = Annotated[str | None, typer.Option("--dependency", help="as sbatch's, such as afterok:123")]
JobName = Annotated[str | None, typer.Option("--job-name", help="default: medvlp- and the run's name")]
CpusPerTask = Annotated[int | None, typer.Option("--cpus-per-task", min=1, help="CPUs of each node")]
Preflight = Annotated[
    bool, typer.Option("--preflight", help="`medvlp doctor` at every start; bad nodes are left out")
]
ServePrototypes = Annotated[
    str | None,
    typer.Option(
        "--serve-prototypes",
        metavar="OPTIONS",
        help="a second component of the job, on a CPU node: medvlp prototypes serve RUN --follow OPTIONS",
    ),
]
BesideChoices = Annotated[
    list[str] | None,
    typer.Option("--beside", help="what the second component asks for otherwise: partition=cpu, mem=8G"),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print the job script and submit nothing")]


@app.command()
def pretrain(
    context: typer.Context,
    arguments: Annotated[
        list[str], typer.Argument(metavar="CONFIG|KEY=VALUE", help="YAML files, then overrides")
    ],
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="number of nodes")] = 1,
    gpus_per_node: Annotated[
        int | None, typer.Option("--gpus-per-node", min=0, help="GPUs of each node; 0: train on CPUs")
    ] = None,
    ranks_per_node: Annotated[
        int | None, typer.Option("--ranks-per-node", min=1, help="default: one per GPU, else one")
    ] = None,
    cpus_per_task: CpusPerTask = None,
    time: Time = None,
    cluster: Cluster = None,
    partition: Partition = None,
    account: Account = None,
    qos: Qos = None,
    constraint: Constraint = None,
    reservation: Reservation = None,
    mem: Memory = None,
    exclusive: Annotated[bool, typer.Option("--exclusive", help="whole nodes")] = False,
    exclude: Exclude = None,
    dependency: Dependency = None,
    job_name: JobName = None,
    signal_seconds: Annotated[
        int | None,
        typer.Option("--signal-seconds", min=10, help="save and stop so long before the time limit"),
    ] = None,
    max_requeues: Annotated[
        int | None, typer.Option("--max-requeues", min=0, help="how often the job may be requeued")
    ] = None,
    preflight: Preflight = False,
    serve_prototypes: ServePrototypes = None,
    beside: BesideChoices = None,
    dry_run: DryRun = False,
) -> None:
    """Submit a pre-training: saved, requeued and resumed until it is done.

    The config is checked here, before anything is queued (exit code 2). Other exit codes: 4 run folder, or a
    job of it is still there; 8 Slurm refused, or is not here.
    """
    from launcher.slurm.cluster_config import load_cluster
    from launcher.slurm.heterogeneous import prototype_server
    from launcher.slurm.submit import PretrainJob, build_request, job_log, submit_pretrain
    from medvlp.config_files import to_yaml

    site = load_cluster(cluster)
    given = slurm_values(context)
    gpus = site.sbatch.gpus_per_node or 0 if gpus_per_node is None else gpus_per_node
    ranks = ranks_per_node or max(1, gpus)
    if gpus and ranks > gpus:
        raise UsageError(
            f"--ranks-per-node {ranks} with --gpus-per-node {gpus}: a rank needs a GPU of its own"
        )
    config = _checked_config(arguments, nodes * ranks, "cuda" if gpus else "cpu")
    run_dir = Path(config.run.dir)
    name = job_name or f"medvlp-{config.run.name or run_dir.name}"
    job = PretrainJob(
        build_request(site, job_log(run_dir), name, nodes, given),
        site,
        run_dir,
        ranks,
        site.sbatch.max_requeues if max_requeues is None else max_requeues,
        preflight,
        prototype_server(site, run_dir, serve_prototypes, given, beside),
    )
    if dry_run:
        typer.echo(job.script(), nl=False)
        return
    words = ["submit", "pretrain", *arguments, *given_options(context)]
    job_id = submit_pretrain(job, to_yaml(config), words)
    typer.echo(f"submitted job {job_id}: {nodes} x {ranks} ranks; run folder {run_dir}")
    print_follow_up(run_dir)


def slurm_values(context: typer.Context) -> dict[str, Any]:
    """What a running command was told to ask of Slurm, by the names of `Request`'s attributes."""
    values = {name: context.params[name] for name in _SLURM_OPTIONS if name in context.params}
    return values | ({"exclusive": True} if context.params.get("exclusive") else {})


def print_follow_up(run_dir: Path) -> None:
    """The commands that follow a job."""
    typer.echo(f"  medvlp jobs\n  medvlp logs {run_dir} -f\n  medvlp cancel {run_dir}")


def _checked_config(arguments: list[str], ranks: int, device: str) -> Any:
    """The config that `medvlp pretrain` would accept on so many ranks; `run.dir` made absolute."""
    from medvlp import config_files
    from medvlp.methods.registry import schemas
    from medvlp.training.batch_plan import plan_batch
    from medvlp.training.deepspeed_config import check_device

    files, overrides = split_arguments(arguments)
    config = config_files.load(files, overrides, schemas())
    plan_batch(config, ranks)
    check_device(config, device)
    config.run.dir = str(Path(config.run.dir).expanduser().absolute())
    return config
