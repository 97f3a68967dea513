"""Which rank this process is, as torchrun, deepspeed or srun say it, and who shows an error. No torch."""

import fcntl
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from shards.errors import MedvlpError

#: Set by our job scripts: the tasks of srun are nodes, each of which starts its ranks itself.
NODE_LAUNCH = "MEDVLP_NODE_LAUNCH"
#: The launcher's LOCAL_RANK, in processes where that had to become the number of the GPU for DeepSpeed.
LAUNCHER_LOCAL_RANK = "MEDVLP_LAUNCHER_LOCAL_RANK"
#: Path of the file into which the first rank of a node with an error writes; only that rank shows its error.
FIRST_ERROR = "MEDVLP_FIRST_ERROR"


class LaunchError(MedvlpError):
    """The launcher's environment variables contradict each other or are incomplete."""


class LostPeerError(MedvlpError):
    """Another rank ended while this one waited for it; that one's message tells the reason."""

    exit_code = 6


@dataclass(frozen=True)
class Ranks:
    """Place of this process among all of them.

    Attributes:
        launcher: "torchrun" (also deepspeed, which sets the same variables), "srun" or "none".
        rank, world_size: over all nodes; local_rank, local_world_size: on this node.
        address, port: where rank 0 listens for the rendezvous.
    """

    launcher: str
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    address: str = "127.0.0.1"
    port: int = 0


def detect(environment: Mapping[str, str] = os.environ) -> Ranks:
    """Read the place of this process.

    A batch script's own process has SLURM_PROCID too but no step id: it is one process, not a rank of srun.
    Nor is the launcher of a node (`NODE_LAUNCH`); its ranks have torchrun's variables.

    Raises:
        LaunchError: RANK without WORLD_SIZE or an address, or a rank beyond the world size.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        ranks = _torchrun(environment)
    elif _is_srun_rank(environment):
        ranks = _srun(environment)
    elif "RANK" in environment:
        raise LaunchError(
            "RANK is set but WORLD_SIZE is not: unset RANK, or start with `medvlp pretrain --nproc N`"
        )
    else:
        return Ranks("none")
    if not 0 <= ranks.rank < ranks.world_size:
        raise LaunchError(
            f"rank {ranks.rank} does not exist among {ranks.world_size} ranks ({ranks.launcher})"
        )
    return ranks


def _is_srun_rank(environment: Mapping[str, str]) -> bool:
    if NODE_LAUNCH in environment or "SLURM_STEP_ID" not in environment:
        return False
    return int(environment.get("SLURM_NTASKS", "1")) > 1


def _torchrun(environment: Mapping[str, str]) -> Ranks:
    world_size = int(environment["WORLD_SIZE"])
    if world_size > 1 and ("MASTER_ADDR" not in environment or "MASTER_PORT" not in environment):
        raise LaunchError("RANK and WORLD_SIZE are set but MASTER_ADDR or MASTER_PORT is not")
    return Ranks(
        "torchrun",
        rank=int(environment["RANK"]),
        world_size=world_size,
        local_rank=int(environment.get(LAUNCHER_LOCAL_RANK) or environment.get("LOCAL_RANK", "0")),
        local_world_size=int(environment.get("LOCAL_WORLD_SIZE", str(world_size))),
        address=environment.get("MASTER_ADDR", "127.0.0.1"),
        port=int(environment.get("MASTER_PORT", "0")),
    )


def _srun(environment: Mapping[str, str]) -> Ranks:
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "127.0.0.1")
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE", "1")
    return Ranks(
        "srun",
        rank=int(environment["SLURM_PROCID"]),
        world_size=int(environment["SLURM_NTASKS"]),
        local_rank=int(environment.get("SLURM_LOCALID", "0")),
        local_world_size=tasks_on_node(tasks, int(environment.get("SLURM_NODEID", "0"))),
        address=environment.get("MASTER_ADDR") or first_node(nodes),
        port=int(environment.get("MASTER_PORT") or job_port(environment)),
    )


def tell_deepspeed(ranks: Ranks, gpu: int | None) -> None:
    """Set LOCAL_RANK, which DeepSpeed takes for the number of the GPU as long as the process lives.

    It is another number where each rank sees one GPU only (`srun --gpus-per-task=1`).

    Args:
        ranks: what the launcher says; `detect` goes on to say it.
        gpu: number of this rank's GPU among those it sees; None on a CPU.
    """
    os.environ.setdefault("LOCAL_RANK", str(ranks.local_rank))  # srun does not set it
    if gpu is not None and gpu != ranks.local_rank:
        os.environ[LAUNCHER_LOCAL_RANK] = str(ranks.local_rank)
        os.environ["LOCAL_RANK"] = str(gpu)


def refuse_lost_gpus(environment: Mapping[str, str] = os.environ) -> None:
    """For a process that found no GPU and was not told to do without.

    Raises:
        LaunchError: Slurm gave this job GPUs here.
    """
    given = environment.get("SLURM_GPUS_ON_NODE", "0")
    if given != "0" and environment.get("DS_ACCELERATOR") != "cpu":
        raise LaunchError(
            f"Slurm gave this job {given} GPUs on {socket.gethostname()}, and torch finds none (driver, "
            "torch without CUDA, a container without GPUs?): `medvlp doctor` there tells more; with "
            "DS_ACCELERATOR=cpu the CPUs are meant"
        )


def job_port(environment: Mapping[str, str]) -> int:
    """A port that all nodes of a Slurm job agree on: from its id, below those that Linux gives to clients."""
    return 10000 + int(environment.get("SLURM_JOB_ID", "0")) % 20000


def available_cpus(environment: Mapping[str, str] = os.environ) -> int:
    """CPUs this process may use: those it is bound to, in a Slurm step no more than its task was given."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    given = environment.get("SLURM_CPUS_PER_TASK") if "SLURM_STEP_ID" in environment else None
    return min(bound, int(given)) if given else bound


def threads_of_rank(ranks: Ranks, environment: Mapping[str, str] = os.environ) -> int:
    """OMP_NUM_THREADS where it is said (not by torchrun, which sets it to 1 unasked), else a share of
    the CPUs: a task of srun has its own, other ranks divide their node's."""
    said = environment.get("OMP_NUM_THREADS", "")
    if said.isdecimal() and int(said) and "TORCHELASTIC_RUN_ID" not in environment:
        return int(said)
    owns_task = ranks.launcher == "srun" and "SLURM_CPUS_PER_TASK" in environment
    sharing = 1 if owns_task else ranks.local_world_size
    return max(1, available_cpus(environment) // sharing)


def first_node(nodes: str) -> str:
    """First host of a Slurm node list: "gpu[07-09,12],login1" -> "gpu07".

    Read here because a container often has no scontrol.
    """
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\])?([^\[,]*)", nodes)
    if match is None:
        raise LaunchError(f"cannot read the Slurm node list {nodes!r}; set MASTER_ADDR")
    return match[1] + (match[2] or "") + match[3]


def tasks_on_node(tasks: str, node: int) -> int:
    """Tasks of node `node` in Slurm's notation: "2(x3),1" means 2, 2, 2, 1."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks):
        counts.extend([int(count)] * int(times or 1))
    if node >= len(counts):
        raise LaunchError(f"node {node} is not in the Slurm task list {tasks!r}")
    return counts[node]


def node_key(ranks: Ranks, environment: Mapping[str, str] = os.environ) -> int:
    """A number that the ranks of one node have in common, and no other node's.

    Ranks follow each other node by node unless Slurm was asked for another distribution; then, and under
    torchrun, the launcher's own number of the node counts.
    """
    name = {"srun": "SLURM_NODEID", "torchrun": "GROUP_RANK"}.get(ranks.launcher, "")
    return int(environment[name]) if name in environment else ranks.rank - ranks.local_rank


def claim_first_error(environment: Mapping[str, str], code: int) -> bool:
    """Whether this rank is the first of its node to show an error; only one is. True without a launcher.

    It leaves `code`, with which it will end, to the launcher (see `first_error`).
    """
    if FIRST_ERROR not in environment:
        return True
    try:
        with Path(environment[FIRST_ERROR]).open("a+", encoding="utf-8") as claim:
            fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(claim.fileno()).st_size:
                return False
            rank = environment.get(LAUNCHER_LOCAL_RANK) or environment.get("LOCAL_RANK", "0")
            claim.write(f"{rank} {code}")
    except BlockingIOError:  # another rank is about to write
        return False
    except OSError:  # a file that cannot be opened must not hide the message
        return True
    return True


def first_error(file: Path) -> tuple[int, int] | None:
    """Local rank and exit code of the first to show an error; None: nobody has."""
    try:
        rank, code = file.read_text(encoding="utf-8").split()
        return int(rank), int(code)
    except (OSError, ValueError):
        return None
