"""What this Slurm allows: time, arrays, requeueing, and the time between the warning signal and the kill."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from launcher.doctor.results import Result, ok, warn
from launcher.slurm import slurm_commands
from launcher.slurm.cluster_config import load_cluster
from launcher.slurm.render import EARLY_SECONDS
from shards.errors import UsageError


def check_slurm(
    cluster: Path | None,
    partition: str | None,
    time: str | None,
    array: int | None,
    environment: Mapping[str, str],
) -> Iterator[Result]:
    """Ask this machine's Slurm, if there is one, and compare a job with what it allows.

    Args:
        cluster: the site's YAML file; partition, time: over it. array: tasks of an array that will run.
        environment: of this process.
    """
    if not slurm_commands.is_installed():
        yield ok("slurm", "not installed on this machine")
        return
    try:
        settings, partitions = slurm_commands.configuration(), slurm_commands.partitions()
    except slurm_commands.SlurmError as error:
        yield warn(
            "slurm", f"no cluster answers ({error})", "on a login node: see SLURM_CONF and scontrol ping"
        )
        return
    default = next((name for name, values in partitions.items() if values.get("Default") == "YES"), None)
    site = load_cluster(cluster).sbatch
    # Slurm takes a list, and starts the job in the one of them that is free first.
    asked = partition or site.partition or environment.get("SLURM_JOB_PARTITION") or default or ""
    names = list(dict.fromkeys(asked.split(",")))
    for name in names:
        if name not in partitions:
            raise UsageError(f"--partition {name}: there are {', '.join(partitions)}")
    yield ok(
        "slurm",
        f"{settings.get('SLURM_VERSION', 'version unknown')}, cluster {settings.get('ClusterName', '?')}",
    )
    limit = time or site.time
    minutes = minutes_of(limit) if limit else None
    for name in names:
        yield from check_partition(settings, partitions[name], minutes, site.signal_seconds)
    yield from check_settings(settings, array)


def check_partition(
    settings: Mapping[str, str], partition: Mapping[str, str], minutes: int | None, signal_lead: int
) -> Iterator[Result]:
    """Compare a job with the limits of a partition.

    Args:
        settings: of `scontrol show config`.
        partition: of `scontrol show partition`.
        minutes: time limit asked for; None: the partition's own.
        signal_lead: seconds before the time limit at which the job asks for its warning signal.
    """
    name, longest = partition.get("PartitionName", "?"), minutes_of(partition.get("MaxTime", "UNLIMITED"))
    if minutes is not None and longest is not None and minutes > longest:
        yield warn(
            "time limit", f"partition {name} allows {partition['MaxTime']}, {minutes} minutes are asked for",
            f"submit with --time={partition['MaxTime']}: the run is checkpointed, requeued and resumed",
        )  # fmt: skip
    else:
        yield ok("time limit", f"partition {name}: at most {partition.get('MaxTime', 'UNLIMITED')}")
    if partition.get("State", "UP") != "UP":
        yield warn(
            "partition",
            f"{name} is {partition['State']}",
            "jobs wait until it is UP; choose another partition",
        )
    yield _signal(
        minutes if minutes is not None else minutes_of(partition.get("DefaultTime", "NONE")), signal_lead
    )
    yield from _preemption(settings, partition)


def check_settings(settings: Mapping[str, str], array: int | None) -> Iterator[Result]:
    """What holds in every partition.

    Args:
        settings: of `scontrol show config`.
        array: tasks of an array, if one is meant to run.
    """
    yield _requeue(settings)
    most = int(settings.get("MaxArraySize", "1001")) - 1
    if array is not None and array > most:
        yield warn(
            "arrays", f"{array} tasks; MaxArraySize allows indexes up to {most}", f"use at most {most} parts"
        )
    else:
        yield ok("arrays", f"up to {most} tasks")


def _signal(minutes: int | None, lead: int) -> Result:
    if minutes is not None and 60 * minutes <= lead + EARLY_SECONDS:
        return warn(
            "warning signal", f"{lead} s before a limit of {minutes} min leave no time to train",
            "ask for more time, or lower the cluster file's signal lead",
        )  # fmt: skip
    return ok(
        "warning signal", f"{lead} s before the time limit (Slurm may send it {EARLY_SECONDS} s earlier)"
    )


def _preemption(settings: Mapping[str, str], partition: Mapping[str, str]) -> Iterator[Result]:
    """A preempted job has the partition's GraceTime to save, and the signal only where the site sends it."""
    mode = partition.get("PreemptMode", settings.get("PreemptMode", "OFF"))
    if mode.upper() == "OFF":
        return
    grace = int(partition.get("GraceTime", "0"))
    warned = "preempt_send_user_signal" in settings.get("SlurmctldParameters", "")
    detail = f"{mode}, {grace} s of grace, warning signal {'sent' if warned else 'not sent'}"
    if "SUSPEND" in mode.upper():
        yield warn("preemption", detail, "suspended ranks keep their memory; GPUs are not freed: use REQUEUE")
    elif grace and warned:
        yield ok("preemption", detail)
    else:
        yield warn(
            "preemption", f"{detail}: a preempted run loses what it did since its last checkpoint",
            "set checkpoint.every_steps to what you can lose; administrators can set GraceTime and "
            "SlurmctldParameters=preempt_send_user_signal",
        )  # fmt: skip


def _requeue(settings: Mapping[str, str]) -> Result:
    kill_wait = settings.get("KillWait", "30 sec")
    if settings.get("JobRequeue") == "0":
        return ok(
            "requeue",
            f"off by default (JobRequeue=0); jobs of `medvlp submit` ask for it; KillWait {kill_wait}",
        )
    return ok(
        "requeue", f"allowed; KillWait {kill_wait}, OverTimeLimit {settings.get('OverTimeLimit', '0 min')}"
    )


def minutes_of(time: str) -> int | None:
    """Minutes of Slurm's "days-hours:minutes:seconds", "hours:minutes:seconds" or "minutes"; None: no limit.

    Seconds are rounded up.
    """
    if time.upper() in ("UNLIMITED", "INFINITE", "NONE", "NOT_SET", "N/A", ""):
        return None
    days, dash, clock = time.rpartition("-")
    fields = [int(field) for field in clock.split(":")]
    if dash:  # days-hours[:minutes[:seconds]]
        hours, minutes, seconds = [*fields, 0, 0][:3]
    elif len(fields) == 3:
        hours, minutes, seconds = fields
    else:  # minutes[:seconds]
        hours, (minutes, seconds) = 0, [*fields, 0][:2]
    return (int(days or 0) * 24 + hours) * 60 + minutes + (seconds > 0)
