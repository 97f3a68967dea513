"""A real all-reduce over the ranks that a run would have: gloo between CPUs, NCCL between GPUs."""

import json
import subprocess
import time
from collections.abc import Iterator
from datetime import timedelta

from launcher.doctor.nodes import inside_job, program, run_on_nodes
from launcher.doctor.results import Result, fail, ok

#: Float32 numbers reduced at once (64 MB), about a bucket of gradients, and how often.
NUMBERS, TIMES = 1 << 24, 5
MARK = "medvlp-all-reduce "
_JOIN = timedelta(seconds=120)


def reduce_as_rank() -> None:
    """Join the group that the environment describes, reduce, check the sum; rank 0 prints what it measured.

    Raises:
        RuntimeError: the sum is wrong, or a rank was lost.
    """
    import torch

    from medvlp import distributed

    device = distributed.initialize(timeout=_JOIN)
    ranks = distributed.world_size()
    started, seconds = time.perf_counter(), []
    for _ in range(TIMES + 1):
        values = torch.full((NUMBERS,), float(distributed.rank() + 1), device=device)
        distributed.barrier()
        started = time.perf_counter()
        total = distributed.sum_over_ranks(values)
        expected = ranks * (ranks + 1) / 2
        if bool((total != expected).any()):  # also waits for the GPU
            raise RuntimeError(
                f"rank {distributed.rank()}: the all-reduce gave another sum than {expected:g}"
            )
        seconds.append(time.perf_counter() - started)
    if distributed.is_main():
        # The first one makes connections. A ring moves 2 (n - 1) / n of the bytes over each link.
        best = min(seconds[1:])
        times = {
            "ranks": ranks,
            "backend": "nccl" if device.type == "cuda" else "gloo",
            "first_seconds": round(seconds[0], 3),
            "seconds": round(best, 4),
            "gigabytes_per_second": round(2 * (ranks - 1) / ranks * 4 * NUMBERS / best / 1e9, 3),
        }
        print(MARK + json.dumps(times), flush=True)
    distributed.shutdown()


def check_collective(environment: dict[str, str]) -> Iterator[Result]:
    """Run `reduce_as_rank` on all nodes of the job, one task a GPU (or a node), or on this machine.

    Args:
        environment: of this process, which is on the first node when it is in a job.
    """
    from launcher.local import free_port

    nodes = inside_job(environment)
    if nodes:
        gpus = environment.get("SLURM_GPUS_ON_NODE", "")
        per_node = int(gpus) if gpus.isdecimal() and int(gpus) else 1
        tasks = [f"--nodes={nodes}", f"--ntasks={nodes * per_node}", f"--ntasks-per-node={per_node}"]
        command = ["srun", *tasks, "--kill-on-bad-exit=1"]
        # Not the port that follows from the job's id: a training of this job may be listening there.
        meeting = {"MASTER_PORT": str(free_port())}
        lines, complaints = run_on_nodes(command, ["doctor-rank"], environment | meeting)
    else:
        lines, complaints = _on_this_machine()
    for line in lines:
        if line.startswith(MARK):
            times = json.loads(line.removeprefix(MARK))
            yield ok(
                "all-reduce",
                f"{times['ranks']} ranks on {times['backend']}: {4 * NUMBERS / 1e6:.0f} MB in "
                f"{times['seconds']:g} s ({times['gigabytes_per_second']:g} GB/s on the wire; the first "
                f"took {times['first_seconds']:g} s)",
            )
            return
    yield fail(
        "all-reduce", f"no result: {complaints or 'no rank said why'}",
        "NCCL_DEBUG=INFO tells more; NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME choose the network interface",
    )  # fmt: skip


def _on_this_machine() -> tuple[list[str], str]:
    """One rank a GPU, or two on the CPU, each in a process of its own."""
    import torch

    from launcher.local import meet_here, rank_environment
    from launcher.placement import Node
    from medvlp.device import uses_cuda

    has_cuda = uses_cuda()
    ranks = torch.cuda.device_count() if has_cuda else 2
    store, node, meeting = meet_here(Node())
    processes = [
        subprocess.Popen(
            [*program({}), "doctor-rank"],
            env=rank_environment(rank, ranks, node, has_cuda) | meeting,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    lines: list[str] = []
    complaints = ""
    for process in processes:
        output, errors = process.communicate(timeout=2 * _JOIN.total_seconds())
        lines += output.splitlines()
        complaints = complaints or (" ".join(errors.split())[-300:] if process.returncode else "")
    del store  # the ranks have met
    return lines, complaints
