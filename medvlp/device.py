"""Which device a process computes on: a GPU of its own where there is one, unless the user says otherwise."""

import os

import torch

from medvlp.ranks import refuse_lost_gpus
from shards.errors import UsageError


def uses_cuda() -> bool:
    """Whether this process computes on a GPU: there is one, and DS_ACCELERATOR does not say cpu."""
    return os.environ.get("DS_ACCELERATOR") != "cpu" and torch.cuda.is_available()


def device_named(name: str) -> torch.device:
    """The device that `--device` asks for: "cpu", "cuda", or "auto", which is CUDA where `uses_cuda`.

    Raises:
        UsageError: no such device.
        LaunchError: no GPU for "auto", and Slurm gave this job some.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--device {name}: there are auto, cpu and cuda")
    if name == "cuda" and not uses_cuda():
        forbidden = torch.cuda.is_available()
        why = "DS_ACCELERATOR=cpu forbids it" if forbidden else "this machine has no usable CUDA device"
        raise UsageError(f"--device cuda: {why}")
    if name == "auto" and not uses_cuda():
        refuse_lost_gpus()
    return torch.device("cuda" if name != "cpu" and uses_cuda() else "cpu")


def choose_device(local_rank: int) -> torch.device:
    """The CUDA device of this local rank, or the CPU; LaunchError where a job has lost its GPUs."""
    if not uses_cuda():
        refuse_lost_gpus()
        return torch.device("cpu")
    # Slurm may show each task only its own GPU, which then is number 0 for all of them.
    return torch.device("cuda", local_rank % torch.cuda.device_count())
