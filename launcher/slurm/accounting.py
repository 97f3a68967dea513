"""What Slurm's records say of jobs that the controller has forgotten."""

from collections.abc import Sequence
from dataclasses import dataclass

from launcher.slurm import slurm_commands
from launcher.slurm.slurm_commands import SlurmError


@dataclass(frozen=True)
class PastRun:
    """One run of a job in the accounting records; a requeued job has several.

    Attributes:
        job_id: as sacct writes it: "24_2" for an array task.
        state: Slurm's word, "COMPLETED"; without the user who cancelled.
        exit_code: of the batch script; 128 + n when signal n ended it; None when Slurm does not say.
        nodes: node list.
        start, end: ISO 8601 local time, or "Unknown".
    """

    job_id: str
    name: str
    state: str
    exit_code: int | None
    nodes: str
    start: str
    end: str


def past_runs(job_id: int) -> list[PastRun]:
    """All runs of a job in the accounting records, oldest first; [] where the site keeps none.

    The records come some seconds late. Without an accounting database the job completion log is read, where
    the site has one.
    """
    fields = "JobID,JobName,State,ExitCode,NodeList,Start,End"
    command = ["sacct", "--jobs", str(job_id), "--duplicates", "--allocations", "--parsable2", "--noheader"]
    try:
        lines = slurm_commands.run_command([*command, f"--format={fields}"]).splitlines()
        return [_past_run(line.split("|")) for line in lines if line.count("|") == 6]
    except SlurmError:
        return _completions(job_id)


def _completions(job_id: int) -> list[PastRun]:
    command = ["sacct", "--completion", "--jobs", str(job_id), "--parsable2", "--noheader"]
    try:
        text = slurm_commands.run_command(
            [*command, "--format=jobid,jobname,state,exitcode,nodelist,start,end"]
        )
    except SlurmError:
        return []
    return [_past_run(line.split("|")) for line in text.splitlines() if line.count("|") == 6]


def _past_run(values: Sequence[str]) -> PastRun:
    job_id, name, state, code, nodes, start, end = values
    exit_code, _, number = code.partition(":")
    known = exit_code.isdigit() and number.isdigit()
    return PastRun(
        job_id,
        name,
        state.split()[0] if state else "UNKNOWN",
        (int(exit_code) or (128 + int(number) if int(number) else 0)) if known else None,
        nodes,
        start,
        end,
    )
