"""What the doctor looks at: a table of checks, each with a name, a look, and a remedy."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.doctor.collective import check_collective
from launcher.doctor.dataset import check_dataset
from launcher.doctor.nodes import NODE_CHECKS, NodeSurroundings, check_nodes, inside_job
from launcher.doctor.results import Check, Result, examine
from launcher.doctor.slurm_limits import check_slurm
from launcher.doctor.storage import check_run_folder
from launcher.doctor.tracking import check_tracking

if TYPE_CHECKING:
    from medvlp.config import Config


@dataclass(frozen=True)
class Surroundings:
    """What is looked at.

    Attributes:
        folder: the run folder. data: the dataset, a folder or URL; None: none is named.
        config: of the run; None without one.
        collective: also run an all-reduce.
        cluster, partition, time, array: of the job that will be submitted; see `medvlp doctor --help`.
        environment: of this process.
    """

    folder: Path
    data: str | None = None
    config: Config | None = None
    collective: bool = False
    cluster: Path | None = None
    partition: str | None = None
    time: str | None = None
    array: int | None = None
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)

    @property
    def job_nodes(self) -> int:
        """Nodes of the job this is in; 0 outside of one."""
        return inside_job(self.environment)

    @property
    def node(self) -> NodeSurroundings:
        """What is looked at on each node: the cache that a run would use."""
        from medvlp.config import DataConfig
        from medvlp.data.cache import cache_folder
        from shards.format import is_remote

        data = DataConfig() if self.config is None else self.config.data
        remote = self.data is not None and is_remote(self.data)
        return NodeSurroundings(cache_folder(data), data.cache_gigabytes, remote)


def _nodes(here: Surroundings) -> Iterator[Result]:
    cache = here.node
    remote = ["--remote-data"] if cache.remote_data else []
    arguments = ["--cache", str(cache.cache), "--cache-gigabytes", str(cache.cache_gigabytes), *remote]
    return check_nodes(here.folder, arguments, here.environment)


#: In the order in which they are made and shown.
CHECKS: tuple[Check[Surroundings], ...] = (
    Check(
        "run folder",
        lambda here: check_run_folder(here.folder),
        "choose another run.dir, on a file system that keeps what is written to it",
    ),
    Check(
        "nodes",
        _nodes,
        "srun has to start a task on every node: see sinfo -N -l, and MEDVLP_NODE_COMMAND for containers",
        lambda here: here.job_nodes > 0,
    ),
    Check(
        "this machine",
        lambda here: examine(NODE_CHECKS, here.node),
        "set data.cache_dir to a node-local folder",
        lambda here: not here.job_nodes,
    ),
    Check(
        "all-reduce",
        lambda here: check_collective(dict(here.environment)),
        "see that the nodes reach each other; NCCL_DEBUG=INFO tells more",
        lambda here: here.collective,
    ),
    Check(
        "dataset",
        lambda here: check_dataset(str(here.data)),
        "run medvlp shards verify on it, or name another data.root",
        lambda here: here.data is not None,
    ),
    Check(
        "W&B",
        lambda here: [check_tracking("auto" if here.config is None else here.config.monitor.wandb)],
        "set monitor.wandb=offline",
    ),
    Check(
        "slurm",
        lambda here: check_slurm(here.cluster, here.partition, here.time, here.array, here.environment),
        "see --cluster, --partition and --time, and `scontrol show config`",
    ),
)
