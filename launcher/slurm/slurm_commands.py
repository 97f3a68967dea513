"""The only file that runs Slurm's programs (sbatch, squeue, scontrol, ...); typed answers."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.errors import MedvlpError, UsageError

#: A controller that does not answer within this many seconds counts as away; Slurm itself retries inside it.
ANSWER_SECONDS = 120.0

#: States from which a job does not come back by itself.
FINAL_STATES = frozenset({
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED",
    "REVOKED", "TIMEOUT",
})  # fmt: skip


class SlurmError(MedvlpError):
    """Slurm is not there, does not answer, or refused; the message holds its own words."""

    exit_code = 8


@dataclass(frozen=True)
class Job:
    """A job as the controller knows it.

    Attributes:
        id: job id; of an array task its own, not the array's.
        name: job name.
        state: Slurm's long name, "RUNNING"; a job that still ends has "COMPLETING" in `flags`.
        flags: further states that stand beside it in newer versions of Slurm.
        reason: why it waits, "Resources"; "None" when nothing.
        nodes: node list, "gpu[01-04]"; "" while it waits.
        restarts: how often Slurm has requeued it.
        partition, user: where and whose.
        time_limit_minutes: None for no limit.
        submit_time, start_time, end_time: seconds since 1970, 0 when unknown; the end of a
            running job is its limit.
        array_job_id, array_task_id: of an array task, else None; tasks that wait stand together in one job
            without a task id.
        array_tasks: those of it that wait, "2-5%2".
        het_job_id: id of the first component of a heterogeneous job, else None.
        het_job_offset: number of the component, from 0.
        standard_output: file of the batch script's output.
        comment: as given to sbatch.
    """

    id: int
    name: str
    state: str
    flags: tuple[str, ...]
    reason: str
    nodes: str
    restarts: int
    partition: str
    user: str
    time_limit_minutes: int | None
    submit_time: int
    start_time: int
    end_time: int
    array_job_id: int | None
    array_task_id: int | None
    array_tasks: str
    het_job_id: int | None
    het_job_offset: int
    standard_output: str
    comment: str

    @property
    def is_over(self) -> bool:
        """Whether it will not run again by itself."""
        return self.state in FINAL_STATES


#: With these Slurm's programs speak of other clusters.
_CLUSTER_VARIABLES = ("SBATCH_CLUSTERS", "SLURM_CLUSTERS")


def is_installed() -> bool:
    """Whether this machine has Slurm's programs for users."""
    return shutil.which("sbatch") is not None and shutil.which("squeue") is not None


def run_command(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """Standard output of one of Slurm's programs, about the cluster of this machine whatever variables say.

    Raises:
        SlurmError: it is not installed, does not answer, or ends with an error.
    """
    given = os.environ if environment is None else environment
    own = {name: value for name, value in given.items() if name not in _CLUSTER_VARIABLES}
    try:
        finished = subprocess.run(
            list(arguments), capture_output=True, timeout=ANSWER_SECONDS, env=own,
            encoding="utf-8", errors="replace",  # names of anybody's jobs, in whatever they wrote them
        )  # fmt: skip
    except FileNotFoundError:
        raise SlurmError(
            f"{arguments[0]} is not installed here: run this on a login node of the cluster"
        ) from None
    except subprocess.TimeoutExpired:
        raise SlurmError(
            f"{arguments[0]} did not answer for {ANSWER_SECONDS:g} s: is slurmctld up? (scontrol ping)"
        ) from None
    if finished.returncode:
        words = " ".join((finished.stderr.strip() or finished.stdout.strip()).split())
        raise SlurmError(f"{arguments[0]}: {words or f'ended with code {finished.returncode}'}")
    return finished.stdout


#: How sbatch's variables call an option, where that is not SBATCH_<OPTION>.
_VARIABLES = {
    "time": ("TIMELIMIT",),
    "array": ("ARRAY_INX",),
    "mem": ("MEM_PER_NODE", "MEM_PER_CPU", "MEM_PER_GPU"),
    "requeue": ("REQUEUE", "NO_REQUEUE"),
    "no-requeue": ("REQUEUE", "NO_REQUEUE"),
}


#: Variables of Slurm that are of no job.
_OF_THE_CLUSTER = frozenset(("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_TIME_FORMAT"))


def submission_environment(script: str, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without the variables that sbatch would follow in place of what a script asks for.

    A user's SBATCH_PARTITION stands above `#SBATCH --partition`; it holds where the script names none. What
    Slurm says of the job from inside which another one is submitted (`salloc`) is not the other's: its srun
    would take that job's memory for its own.
    """
    asked = re.findall(r"^#SBATCH --([a-z-]+)", script, re.MULTILINE)
    names = [name for option in asked for name in _VARIABLES.get(option, (option.upper().replace("-", "_"),))]
    taken = {f"SBATCH_{name}" for name in [*names, "WAIT"]}  # WAIT: it would answer at the job's end
    return {
        name: value
        for name, value in environment.items()
        if name not in taken and (not name.startswith("SLURM_") or name in _OF_THE_CLUSTER)
    }


_OTHER_CLUSTER = (
    "jobs, logs and cancel would look for it in the cluster of this machine: submit from a login node of "
    "the other one, or with its SLURM_CONF"
)


def submit(script: Path, arguments: Sequence[str] = ()) -> int:
    """`sbatch ARGUMENTS SCRIPT`; the job's id. What the script asks for stands above the environment.

    Raises:
        UsageError: the environment names other clusters.
        SlurmError: the script was refused.
    """
    for name in _CLUSTER_VARIABLES:
        said = os.environ.get(name)
        if said and said != configuration().get("ClusterName"):  # modules of some sites name the own one
            raise UsageError(f"{name}={said}: {_OTHER_CLUSTER}; unset {name}")
    environment = submission_environment(script.read_text(encoding="utf-8"), os.environ)
    command = ["sbatch", "--parsable", *arguments, str(script)]
    answer = run_command(command, environment).strip().splitlines()[-1]
    match = re.fullmatch(r"(\d+)(?:;(\S+))?", answer)
    if match is None:
        raise SlurmError(f"sbatch answered {answer!r} instead of a job id")
    cluster = match[2]
    if cluster and cluster != configuration().get("ClusterName"):
        run_command(["scancel", f"--clusters={cluster}", match[1]])
        raise SlurmError(
            f"sbatch gave job {match[1]} to cluster {cluster}, where it was cancelled: {_OTHER_CLUSTER}"
        )
    return int(match[1])


def check_script(script: Path, arguments: Sequence[str] = ()) -> str:
    """What `sbatch --test-only` says about when and where a script would run.

    Raises:
        SlurmError: it could never run.
    """
    command = ["sbatch", "--test-only", *arguments, str(script)]
    try:
        finished = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS)
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        raise SlurmError(f"sbatch --test-only cannot be run: {error}") from error
    if finished.returncode:
        raise SlurmError(f"sbatch --test-only: {' '.join(finished.stderr.split())}")
    return finished.stderr.strip()


#: States in which processes of a job may be there.
_OCCUPYING = frozenset(("RUNNING", "SUSPENDED", "STOPPED", "COMPLETING", "CONFIGURING", "SIGNALING"))


def list_jobs(ids: Sequence[int] | None = None, user: str | None = None) -> list[Job]:
    """Jobs that the controller still knows (finished ones for some minutes: MinJobAge), oldest first.

    Args:
        ids: only these; array tasks and components of het jobs are found by the id that sbatch printed.
        user: only this user's.

    Raises:
        SlurmError: the controller does not answer.
    """
    try:
        jobs = [_job(entry) for entry in json.loads(run_command(["squeue", "--json"]))["jobs"]]
    except (ValueError, KeyError, TypeError) as error:
        raise SlurmError(f"squeue --json: its answer cannot be read ({type(error).__name__})") from error
    if ids is not None:
        jobs = [job for job in jobs if {job.id, job.array_job_id, job.het_job_id} & set(ids)]
    if user is not None:
        jobs = [job for job in jobs if job.user == user]
    return sorted(jobs, key=lambda job: job.id)


def has_ended(job_id: int, task: int | None = None) -> bool:
    """Whether a job with all components or tasks, or one task, is over for good, or forgotten by Slurm.

    For those who ask again and again: `list_jobs` brings all jobs of the cluster.

    Raises:
        SlurmError: the controller does not answer.
    """
    command = ["squeue", "--noheader", "--array", "--states=all", f"--jobs={job_id}", "--format=%K %T"]
    try:
        lines = [line.split() for line in run_command(command).splitlines()]
    except SlurmError as error:
        if "Invalid job id" in str(error):
            return True
        raise
    return all(state in FINAL_STATES for index, state in lines if task is None or index == str(task))


def job_is_over(job: str, uid: int) -> bool | None:
    """Whether no process of a user's job, "cluster/id", is left; None: another cluster's, or no answer.

    Nor is there one about a colleague's job where the site shows users their own only: it may run unseen.
    """
    cluster, _, number = job.rpartition("/")
    try:
        config = configuration() if is_installed() and number.isdigit() else {}
        if not cluster or config.get("ClusterName") != cluster:
            return None
        jobs = list_jobs([int(number)])
    except SlurmError:
        return None
    if not jobs and uid != os.getuid() and {"jobs", "all"} & set(config.get("PrivateData", "").split(",")):
        return None
    return not any(_OCCUPYING & {found.state, *found.flags} for found in jobs)


def _job(entry: Mapping[str, Any]) -> Job:
    states = entry["job_state"]
    states = [states] if isinstance(states, str) else list(states)  # a list since Slurm 23.11
    return Job(
        id=int(entry["job_id"]),
        name=str(entry["name"]),
        state=str(states[0]),
        flags=tuple(str(state) for state in states[1:]),
        reason=str(entry["state_reason"]),
        nodes=str(entry["nodes"] or ""),
        restarts=_number(entry["restart_cnt"]) or 0,
        partition=str(entry["partition"]),
        user=str(entry["user_name"]),
        time_limit_minutes=_number(entry["time_limit"]),
        submit_time=_number(entry["submit_time"]) or 0,
        start_time=_number(entry["start_time"]) or 0,
        end_time=_number(entry["end_time"]) or 0,
        array_job_id=_number(entry["array_job_id"]) or None,
        array_task_id=_number(entry["array_task_id"]),
        array_tasks=str(entry.get("array_task_string") or ""),
        het_job_id=_number(entry["het_job_id"]) or None,
        het_job_offset=_number(entry.get("het_job_offset")) or 0,
        standard_output=str(entry.get("standard_output") or ""),
        comment=str(entry.get("comment") or ""),
    )


def _number(value: Any) -> int | None:
    """A number of Slurm's JSON: plain in 22.05, {"set": true, "infinite": false, "number": 3} later."""
    if isinstance(value, Mapping):
        return int(value["number"]) if value.get("set") and not value.get("infinite") else None
    return None if value is None else int(value)


def requeue(job_id: str) -> None:
    """`scontrol requeue`: the job waits again and starts its script anew.

    Raises:
        SlurmError: Slurm refused (a job with --no-requeue).
    """
    run_command(["scontrol", "requeue", job_id])


def cancel(job_id: str, *more: str) -> None:
    """`scancel MORE JOB`, such as `--signal=USR1 --batch`; nothing happens to a job that is over.

    Raises:
        SlurmError: not allowed.
    """
    run_command(["scancel", *more, job_id])


def update_job(job_id: str, **values: str) -> None:
    """`scontrol update JobId=ID Name=Value`.

    Raises:
        SlurmError: Slurm refused.
    """
    run_command(
        ["scontrol", "update", f"JobId={job_id}", *(f"{name}={value}" for name, value in values.items())]
    )


def configuration() -> dict[str, str]:
    """Slurm's running configuration by its own names (`scontrol show config`).

    Raises:
        SlurmError: the controller does not answer.
    """
    lines = run_command(["scontrol", "show", "config"]).splitlines()
    pairs = (line.split("=", 1) for line in lines if "=" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def partitions() -> dict[str, dict[str, str]]:
    """Every partition's settings by Slurm's own names (`scontrol show partition`).

    Raises:
        SlurmError: the controller does not answer.
    """
    lines = run_command(["scontrol", "show", "partition", "--oneliner"]).splitlines()
    listed = [dict(pair.split("=", 1) for pair in line.split() if "=" in pair) for line in lines]
    return {values["PartitionName"]: values for values in listed if "PartitionName" in values}


def host_names(nodes: str) -> list[str]:
    """`gpu[1-2]` -> ["gpu1", "gpu2"].

    Raises:
        SlurmError: no such node list.
    """
    return run_command(["scontrol", "show", "hostnames", nodes]).split()


def node_address(node: str) -> str | None:
    """The address at which Slurm reaches a node (NodeAddr); None without Slurm's programs or such a node."""
    try:
        text = run_command(["scontrol", "show", "node", node, "--oneliner"])
    except SlurmError:
        return None
    match = re.search(r"\bNodeAddr=(\S+)", text)
    return match[1] if match else None
