"""What a site's Slurm cluster needs in every job: `configs/clusters/*.yaml`."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from medvlp.config import key
from medvlp.config_files import ConfigError, load_schema

#: A name that a shell can export.
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass
class SbatchDefaults:
    """What `medvlp submit` asks for when the command line does not say it."""

    partition: str | None = key(None, "partition; default: the cluster's own")
    account: str | None = key(None, "account that pays")
    qos: str | None = key(None, "quality of service")
    constraint: str | None = key(None, "features the nodes must have, such as h100")
    reservation: str | None = key(None, "reservation to run in")
    time: str | None = key(None, "time limit as sbatch writes it: minutes, HH:MM:SS or D-HH:MM:SS")
    mem: str | None = key(None, "memory of each node, such as 500G; 0: all of it")
    exclusive: bool = key(False, "whole nodes, shared with no other job")
    cpus_per_task: int | None = key(None, "CPUs of each node, shared by its ranks", 1, 4096)
    gpus_per_node: int | None = key(None, "GPUs of each node; 0: train on CPUs", 0, 1024)
    gpu_type: str | None = key(None, "type of the GPUs where a cluster has several, such as a100")
    gpu_memory: float | None = key(
        None,
        "GiB of one GPU, such as 80: a run that will not fit is refused before it waits in a queue",
        0.1,
        10**5,
    )
    exclude: str | None = key(None, "nodes never to use")
    signal_seconds: int = key(
        300,
        "how long before the time limit the run is asked to save and stop; Slurm may do so a minute earlier",
        10,
        10**5,
    )
    max_requeues: int = key(100, "how often one job may be requeued", 0, 10**6)
    extra: list[str] = key([], "more options of sbatch, each as --name=value")


@dataclass
class Container:
    """The image that ranks run in; Slurm's own programs run outside of it."""

    kind: Literal["none", "apptainer", "pyxis"] = key(
        "none", "apptainer (a command), or pyxis (enroot through srun's --container options)"
    )
    image: str | None = key(None, "file or address of the image; it holds medvlp")
    mounts: list[str] = key([], "source:target[:options] of each folder seen inside; run folder and data too")
    options: list[str] = key([], "more options of `apptainer exec`, or of srun with pyxis")


@dataclass
class Folders:
    """Node-local places; $VARIABLES of the job may stand in them, and each is made before the ranks start."""

    tmp: str | None = key(None, "TMPDIR")
    data_cache: str | None = key(None, "data.cache_dir of the run: remote shards and token ids")
    hf_home: str | None = key(None, "HF_HOME: downloaded models and tokenizers (shared, filled beforehand)")
    triton_cache: str | None = key(None, "TRITON_CACHE_DIR: compiled kernels (never on a network disk)")
    torch_extensions: str | None = key(None, "TORCH_EXTENSIONS_DIR: operators that DeepSpeed compiles")


@dataclass
class ClusterConfig:
    """Settings of one cluster; `medvlp submit --cluster FILE` reads them."""

    sbatch: SbatchDefaults = field(default_factory=SbatchDefaults)
    modules: list[str] = key([], "environment modules to load, in this order, after a purge")
    setup: list[str] = key(
        [],
        "lines of shell run in the job script first; one that must not fail ends in `|| exit 2`",
    )
    command: list[str] = key(
        [], "how a job calls this program; default: the Python of the submitting environment"
    )
    container: Container = field(default_factory=Container)
    environment: dict[str, str] = key({}, "variables of every job: NCCL, network, proxies")
    folders: Folders = field(default_factory=Folders)
    srun: list[str] = key([], "more options of srun")
    cpu_bind: str = key("cores", "srun's --cpu-bind (cores, none, a mask); none without cpus_per_task")


def load_cluster(file: Path | str | None) -> ClusterConfig:
    """Read a cluster's YAML file; None gives the defaults: no modules, no container, Slurm's own defaults.

    Raises:
        ConfigError: unreadable file, unknown key, wrong type, or values that cannot stand together.
    """
    if file is None:
        return ClusterConfig()
    config = load_schema(file, ClusterConfig)
    if config.container.kind != "none" and not config.container.image:
        raise ConfigError(f"{file}: container.kind={config.container.kind} needs container.image")
    if config.container.kind == "none" and config.container.image:
        raise ConfigError(f"{file}: container.image is set: choose container.kind=apptainer or pyxis")
    for name in config.environment:
        if not _VARIABLE.fullmatch(name):
            raise ConfigError(f"{file}: environment: {name!r} is no name of a variable")
    for option in [*config.sbatch.extra, *config.srun]:
        if not option.startswith("-"):
            raise ConfigError(f"{file}: {option!r} is no option: write --name=value")
    for option in config.sbatch.extra:
        if re.match(r"-M|--clusters?(=|\s|$)", option):
            raise ConfigError(
                f"{file}: sbatch.extra: {option}: jobs of another cluster are not watched from here; "
                "submit from its own login node, or with its SLURM_CONF"
            )
    for mount in config.container.mounts:
        if ":" not in mount:
            raise ConfigError(f"{file}: container.mounts: {mount!r} is not source:target")
    return config
