"""This node: GPUs, shared memory, limits of processes. Imports torch."""

import os
import resource
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from launcher.doctor.results import Result, fail, ok, warn

GIB = 2**30
#: Open files that data workers with many shards, W&B and NCCL's sockets may need together.
ENOUGH_FILES = 4096
#: Batches travel from data workers to the rank through shared memory.
ENOUGH_SHARED_MEMORY = GIB


def check_machine() -> Iterator[Result]:
    """Accelerators, `/dev/shm`, `ulimit -n` and `ulimit -l`."""
    yield from check_accelerators(os.environ)
    yield _shared_memory(Path("/dev/shm"))
    yield open_files(resource.getrlimit(resource.RLIMIT_NOFILE))
    adapters = Path("/sys/class/infiniband")
    yield locked_memory(
        resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], adapters.is_dir() and any(adapters.iterdir())
    )


def check_accelerators(environment: Mapping[str, str]) -> Iterator[Result]:
    """Whether the GPUs that Slurm gave (SLURM_GPUS_ON_NODE) are there and compute."""
    import torch

    given = environment.get("SLURM_GPUS_ON_NODE", "")
    expected = int(given) if given.isdecimal() else 0
    if not torch.cuda.is_available():
        version = f"torch {torch.__version__}, {len(os.sched_getaffinity(0))} CPUs, gloo"
        if expected and environment.get("DS_ACCELERATOR") != "cpu":
            yield fail(
                "accelerators", f"Slurm gave {expected} GPUs and torch sees none ({version})",
                "install a CUDA build of torch that fits the driver (nvidia-smi); apptainer needs --nv",
            )  # fmt: skip
        else:
            yield ok("accelerators", f"no GPU; {version}")
        return
    count = torch.cuda.device_count()
    nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    names = ", ".join(sorted({torch.cuda.get_device_name(index) for index in range(count)}))
    detail = f"{count} x {names}; torch {torch.__version__}, NCCL {nccl}"
    if expected and count != expected:
        yield fail(
            "accelerators", f"Slurm gave {expected} GPUs and torch sees {count}: {detail}",
            "look at CUDA_VISIBLE_DEVICES and nvidia-smi on this node; a GPU may have fallen off its bus",
        )  # fmt: skip
        return
    for index in range(count):
        yield from _gpu_problems(index)
    yield ok("accelerators", detail)


def _gpu_problems(index: int) -> Iterator[Result]:
    """Multiply two matrices of ones on the GPU, and look at its memory."""
    import torch

    size = 512
    try:
        free, total = torch.cuda.mem_get_info(index)
        ones = torch.ones(size, size, device=f"cuda:{index}")
        wrong = bool(((ones @ ones) != size).any())
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        yield fail(
            f"GPU {index}", f"does not compute: {reason}", "drain the node; nvidia-smi -q tells of Xid errors"
        )
        return
    if wrong:
        yield fail(f"GPU {index}", "multiplied two matrices wrongly", "drain the node")
    # A driver, a context and torch's first block take up to a GiB or so of an idle GPU.
    elif total - free > max(2 * GIB, 0.1 * total):
        used = f"{(total - free) / GIB:.1f} of {total / GIB:.1f} GiB are in use before a run starts"
        yield warn(f"GPU {index}", used, "see nvidia-smi for a process that was left behind")


def _shared_memory(folder: Path) -> Result:
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return fail(
            "shared memory", f"{folder}: {error.strerror}",
            "locks of data workers, and NCCL, are there: mount a tmpfs, or run with data.workers=0",
        )  # fmt: skip
    if free < ENOUGH_SHARED_MEMORY:
        return warn(
            "shared memory", f"{folder} has {free / GIB:.2f} GiB free",
            "enlarge it (in docker: --ipc=host or --shm-size): NCCL needs it between the GPUs of a node",
        )  # fmt: skip
    return ok("shared memory", f"{folder} has {free / GIB:.1f} GiB free")


def open_files(limits: tuple[int, int]) -> Result:
    """`limits`: soft and hard limit of open files of a process."""
    soft, hard = limits
    if soft == resource.RLIM_INFINITY or soft >= ENOUGH_FILES:
        return ok("open files", "unlimited" if soft == resource.RLIM_INFINITY else f"ulimit -n {soft}")
    remedy = f"put `ulimit -n {ENOUGH_FILES}` into the cluster file's setup"
    if hard != resource.RLIM_INFINITY and hard < ENOUGH_FILES:
        remedy = f"ask an administrator for a hard limit of {ENOUGH_FILES} (LimitNOFILE of slurmd)"
    return warn("open files", f"ulimit -n {soft} (hard limit {hard})", remedy)


def locked_memory(soft: int, has_infiniband: bool) -> Result:
    """`soft`: bytes a process may pin; RDMA adapters need it unlimited."""
    if soft == resource.RLIM_INFINITY:
        return ok("locked memory", "unlimited")
    detail = f"ulimit -l {soft // 1024} KiB"
    if has_infiniband:
        return fail(
            "locked memory", f"{detail}, and InfiniBand registers memory",
            "ask an administrator: LimitMEMLOCK=infinity of slurmd and PropagateResourceLimitsExcept=MEMLOCK",
        )  # fmt: skip
    return ok("locked memory", f"{detail}; no InfiniBand adapter needs more")
