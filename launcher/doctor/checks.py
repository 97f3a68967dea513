"""What the doctor looks at: a table of checks, each with a name, a look, and a remedy."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.doctor.collective import check_collective
from launcher.doctor.nodes import NODE_CHECKS, NodeSurroundings, check_nodes, inside_job
from launcher.doctor.results import Check, Result, examine
from launcher.doctor.slurm_limits import check_slurm
from launcher.doctor.storage import check_run_folder

if TYPE_CHECKING:
    from medvlp.config import Config
import random
import time
import urllib.error
import urllib.request

from launcher.doctor.results import fail, ok, warn

#: Shards whose hash is compared, and samples that are decoded, spread over the dataset.
SHARDS, SAMPLES = 2, 16


def check_dataset(root: str) -> Iterator[Result]:
    """Compare the hashes of `SHARDS` shards with the index, and decode `SAMPLES` images.

    Args:
        root: dataset folder or URL; of a URL only the index is read.
    """
    from shards.errors import DataError
    from shards.format import Index, hash_file, is_remote
    from shards.images import decode_image
    from shards.reader import ShardReader

    started = time.monotonic()
    try:
        index = Index.load(root)
    except DataError as error:
        yield fail("dataset", str(error), "see data.root; build one with `medvlp shards build`")
        return
    if is_remote(root):
        yield ok("dataset", f"{root}: index read, {len(index.shards)} shards (not fetched)")
        return
    choose = random.Random(index.fingerprint)
    shards = choose.sample(index.shards, min(SHARDS, len(index.shards)))
    try:
        damaged = [shard.file for shard in shards if hash_file(Path(root) / shard.file) != shard.hash]
    except OSError as error:
        yield fail("dataset", f"{root}: {error.filename}: {error.strerror}", f"medvlp shards verify {root}")
        return
    if damaged:
        yield fail(
            "dataset", f"{root}: {', '.join(damaged)}: not as the index says", f"medvlp shards verify {root}"
        )
        return
    reader = ShardReader(root)
    try:
        for split in index.splits:
            count = reader.sample_count(split)
            for position in choose.sample(range(count), min(SAMPLES // len(index.splits) + 1, count)):
                decode_image(reader.image(split, position))
    except DataError as error:
        yield fail("dataset", f"{root}: {error}", f"medvlp shards verify {root}")
        return
    finally:
        reader.close()
    seconds = time.monotonic() - started
    yield ok(
        "dataset",
        f"{root}: {index.name}, {len(index.shards)} shards; {len(shards)} compared and samples decoded "
        f"in {seconds:.1f} s",
    )


def check_memory(config: Config, gpus: int, memory: float) -> Result:
    """Whether a run fits GPUs of `memory` GiB, of which it has `gpus`."""
    from medvlp.training.memory_plan import GIB, plan_run, refusal
    from shards.errors import MedvlpError

    try:
        plan, _ = plan_run(config, gpus, memory)
    except MedvlpError as error:
        return warn("GPU memory", f"not planned: {error}", "run the doctor where the dataset is")
    if (reason := refusal(plan)) is not None:
        return fail("GPU memory", reason, "medvlp config CONFIG... --plan --gpus N --gpu-memory G")
    need = plan.total(plan.micro_batch) / GIB
    return ok(
        "GPU memory",
        f"{need:.1f} of {plan.usable / GIB:.1f} GiB on {gpus} GPUs with micro-batches of {plan.micro_batch} "
        f"(at most {plan.largest})",
    )


_SECONDS = 5.0


def check_tracking(mode: str = "auto") -> Result:
    """Ask W&B's server for a page when the run would log online (proxies of the environment are used).

    Args:
        mode: `monitor.wandb`.
    """
    from medvlp.training.wandb_run import resolve_mode

    resolved = resolve_mode(mode)
    if resolved == "disabled":
        return ok("W&B", "disabled")
    if resolved == "offline":
        return ok("W&B", "offline (no API key): later, where there is a network: medvlp runs FOLDER --sync")
    url = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    if not url.startswith(("http://", "https://")):
        return warn(
            "W&B", f"WANDB_BASE_URL={url} is no web address", "correct it, or set monitor.wandb=offline"
        )
    try:
        with urllib.request.urlopen(url, timeout=_SECONDS):
            pass
    except urllib.error.HTTPError:
        pass  # it answered
    except OSError as error:
        reason = getattr(error, "reason", error)
        return warn(
            "W&B", f"{url} cannot be reached ({reason}); runs go on, logged offline",
            "set monitor.wandb=offline on this cluster and sync later, or set HTTPS_PROXY",
        )  # fmt: skip
    return ok("W&B", f"{url} answers")


@dataclass(frozen=True)
class Surroundings:
    """What is looked at.

    Attributes:
        folder: the run folder. data: the dataset, a folder or URL; None: none is named.
        config: of the run; None without one.
        collective: also run an all-reduce.
        cluster, partition, time, array: of the job that will be submitted; see `medvlp doctor --help`.
        gpus, gpu_memory: of the run, and GiB of one; None: what the cluster file says, else what is here.
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
    gpus: int | None = None
    gpu_memory: float | None = None
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)

    @property
    def job_nodes(self) -> int:
        """Nodes of the job this is in; 0 outside of one."""
        return inside_job(self.environment)

    @cached_property
    def planned_gpus(self) -> tuple[int, float] | None:
        """How many GPUs a run will have, and GiB of one; None: nobody says, or there are none."""
        import torch

        from launcher.slurm.cluster_config import load_cluster

        site = load_cluster(self.cluster).sbatch
        here = torch.cuda.device_count() if self.environment.get("DS_ACCELERATOR") != "cpu" else 0
        memory = self.gpu_memory or site.gpu_memory
        if memory is None and here:
            memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        gpus = self.gpus or max(1, self.job_nodes) * (site.gpus_per_node or here)
        return None if memory is None or not gpus else (gpus, memory)

    @property
    def node(self) -> NodeSurroundings:
        """What is looked at on each node: the cache that a run would use, and what it would compile with."""
        from medvlp.config import DataConfig
        from medvlp.data.cache import cache_folder
        from shards.format import is_remote

        data = DataConfig() if self.config is None else self.config.data
        remote = self.data is not None and is_remote(self.data)
        offload = self.config is not None and self.config.zero.offload_optimizer
        return NodeSurroundings(cache_folder(data), data.cache_gigabytes, remote, offload)


def _memory(here: Surroundings) -> Iterator[Result]:
    if here.config is not None and here.planned_gpus is not None:
        yield check_memory(here.config, *here.planned_gpus)


def _nodes(here: Surroundings) -> Iterator[Result]:
    cache = here.node
    arguments = ["--cache", str(cache.cache), "--cache-gigabytes", str(cache.cache_gigabytes)]
    arguments += ["--remote-data"] if cache.remote_data else []
    arguments += ["--offload"] if cache.offload else []
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
        "GPU memory",
        _memory,
        "medvlp config CONFIG... --plan says what the run takes",
        lambda here: here.config is not None,
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
