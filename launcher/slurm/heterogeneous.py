"""Heterogeneous jobs: the training is component 0; component 1, on a CPU node, runs something beside it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher.slurm.cluster_config import ClusterConfig
from launcher.slurm.render import SlurmRequest, build_request, directives
from shards.errors import UsageError

#: What sbatch takes from the first component only.
_OF_THE_WHOLE_JOB = ("--job-name=", "--output=", "--open-mode=", "--dependency=", "--signal=")
#: What component 1 may be told to ask for otherwise.
_CHOICES = ("partition", "account", "qos", "constraint", "reservation", "mem", "cpus_per_task", "time")


@dataclass(frozen=True)
class Beside:
    """What runs next to the training.

    Attributes:
        request: what its component asks of Slurm.
        words: the command behind `medvlp`.
    """

    request: SlurmRequest
    words: list[str]


def component_directives(request: SlurmRequest) -> list[str]:
    """The `#SBATCH` lines that begin another component of a job."""
    lines = directives(request)
    return ["#SBATCH hetjob"] + [
        line for line in lines if not line.removeprefix("#SBATCH ").startswith(_OF_THE_WHOLE_JOB)
    ]


def prototype_server(
    site: ClusterConfig,
    run_dir: Path,
    words: Sequence[str] | None,
    given: Mapping[str, Any],
    choices: Sequence[str] | None,
) -> Beside | None:
    """The read-only prototype server of a run, following its checkpoints; None where `words` is None.

    Args:
        site: the cluster's settings.
        run_dir: the run folder.
        words: the command behind `medvlp` that serves it.
        given: what the training asks of Slurm; the component asks for the same where that makes sense.
        choices: `name=value` for what it asks for otherwise.

    Raises:
        UsageError: a choice that does not exist, or choices without a server.
    """
    if words is None:
        if choices:
            raise UsageError("--beside is for the component of --serve-prototypes")
        return None
    same = {name: given.get(name) for name in ("time", "partition", "account", "qos", "reservation")}
    request = build_request(site, run_dir, "beside", 1, same | _chosen(choices or ()))
    alone = replace(request, gpus_per_node=0, gpu_type=None, exclusive=False, signal_seconds=None)
    return Beside(alone, list(words))


def _chosen(choices: Sequence[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for choice in choices:
        name, _, value = choice.partition("=")
        if name not in _CHOICES or not value:
            raise UsageError(f"--beside {choice}: write one of {', '.join(_CHOICES)} as name=value")
        values[name] = value
    return values
