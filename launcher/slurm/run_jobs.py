"""Which Slurm jobs belong to which run folder, and what `medvlp jobs` shows of them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.json_lines import newest_first
from launcher.run_state import CONFIG, SLURM_FOLDER, SUBMISSIONS, RunState, is_run_folder, read_run
from launcher.slurm import slurm_commands
from launcher.slurm.slurm_commands import Job, PastRun, SlurmError
from medvlp.runs.events import EVENTS
from shards.errors import UsageError

#: `kind` of a submission that trains.
TRAINING = "pretrain"
#: What is shown for a further component of its job.
BESIDE = "beside"


class UnknownJobError(SlurmError):
    """No run folder or job fits what the user named."""


@dataclass(frozen=True)
class RunJob:
    """A job and the run it works for.

    Attributes:
        submitted: the id that sbatch printed: of the array, or the first component.
        label: its id as squeue writes it: "12", "24_3", "24_[4-7]", "30+1".
        kind: what was submitted, such as "pretrain"; "" when the folder does not say.
        job: as the controller knows it; None for one it has forgotten.
        past: its runs in the accounting records, when it was looked for there.
        run: the run folder's state; None where the folder is no run (a dataset) or cannot be read.
    """

    submitted: int
    label: str
    kind: str
    folder: Path
    job: Job | None
    past: list[PastRun]
    run: RunState | None

    @property
    def state(self) -> str:
        """Slurm's word; "UNKNOWN" when neither controller nor records know the job."""
        if self.job is not None:
            return self.job.state
        return self.past[-1].state if self.past else "UNKNOWN"

    @property
    def is_over(self) -> bool:
        """Whether it will not run again by itself."""
        return self.job is None or self.job.is_over


def folder_of(job: Job) -> Path | None:
    """The folder a job works for; None if `medvlp submit` did not start it.

    Its output goes to `FOLDER/slurm/job-<id>.out`, which Slurm tells.
    """
    output = Path(job.standard_output)
    if output.parent.name != SLURM_FOLDER or not output.name.startswith("job-"):
        return None
    folder = output.parent.parent
    try:
        return folder if (folder / SLURM_FOLDER / SUBMISSIONS).is_file() else None
    except PermissionError:  # somebody else's
        return None


def jobs_by_folder() -> dict[Path, list[Job]] | None:
    """Jobs the controller knows of every folder, resolved; None where no Slurm answers."""
    if not slurm_commands.is_installed():
        return None
    try:
        jobs = slurm_commands.list_jobs()
    except SlurmError:
        return None
    found: dict[Path, list[Job]] = {}
    for job in jobs:
        folder = folder_of(job)
        if folder is not None:
            found.setdefault(folder.resolve(), []).append(job)
    return found


def submissions(folder: Path) -> list[dict[str, Any]]:
    """Lines of `FOLDER/slurm/jobs.jsonl` that name a job, newest first."""
    lines = newest_first(folder / SLURM_FOLDER / SUBMISSIONS)
    return [line for line in lines if type(line.get("job_id")) is int]


def newest_submission(folder: Path) -> int | None:
    """Id of the job submitted last for a folder."""
    return next((int(line["job_id"]) for line in submissions(folder)), None)


def kind_of(folder: Path, job_id: int) -> str:
    """What was submitted as this job (or array, or heterogeneous job)."""
    return next((str(line.get("kind")) for line in submissions(folder) if line.get("job_id") == job_id), "")


def submitted_id(job: Job) -> int:
    """The id that sbatch printed for a job: that of its array or first component."""
    return job.array_job_id or job.het_job_id or job.id


def label_of(job: Job) -> str:
    """The id as squeue writes it."""
    if job.het_job_id is not None:
        return f"{job.het_job_id}+{job.het_job_offset}"
    if job.array_job_id is None:
        return str(job.id)
    task = f"[{job.array_tasks}]" if job.array_task_id is None else str(job.array_task_id)
    return f"{job.array_job_id}_{task}"


def current_jobs(user: str | None) -> Iterator[RunJob]:
    """Jobs of `medvlp submit` that the controller still knows, with the state of their runs.

    Args:
        user: only this user's; None: everybody's.
    """
    states: dict[Path, RunState | None] = {}
    for job in slurm_commands.list_jobs(user=user):
        folder = folder_of(job)
        if folder is None:
            continue
        if folder not in states:
            states[folder] = state_of(folder)
        kind = BESIDE if job.het_job_offset else kind_of(folder, submitted_id(job))
        yield RunJob(submitted_id(job), label_of(job), kind, folder, job, [], states[folder])


def jobs_of(folder: Path) -> Iterator[RunJob]:
    """All jobs ever submitted for a folder, oldest first; those the controller forgot, from the records."""
    lines = submissions(folder)[::-1]
    ids = [int(line["job_id"]) for line in lines]
    known = slurm_commands.list_jobs(ids) if ids else []
    run = state_of(folder)
    for line in lines:
        current = [job for job in known if submitted_id(job) == line["job_id"]]
        kind = str(line.get("kind") or "")
        for job in current:
            shown = BESIDE if job.het_job_offset else kind
            yield RunJob(submitted_id(job), label_of(job), shown, folder, job, [], run)
        if not current:
            past = slurm_commands.past_runs(int(line["job_id"]))
            yield RunJob(int(line["job_id"]), str(line["job_id"]), kind, folder, None, past, run)


def state_of(folder: Path) -> RunState | None:
    """The state of the run in a folder; None for a dataset, or a folder that cannot be read."""
    try:
        if not (folder / CONFIG).is_file() and not (folder / EVENTS).is_file():
            return None
        return read_run(folder, measure_size=False)
    except OSError:
        return None


def find(target: str) -> tuple[Path, int | None]:
    """The folder, and the job if one was named, that a user means by a run folder or a job id.

    Raises:
        UnknownJobError: neither, or a job that is not of `medvlp submit`.
        UsageError: a folder nothing was submitted for.
    """
    if Path(target).is_dir():
        folder = Path(target)
        if not is_run_folder(folder) and not (folder / SLURM_FOLDER / SUBMISSIONS).is_file():
            raise UsageError(f"{target} is no run folder, and no job was submitted for it")
        return folder, None
    number = target.partition("_")[0]
    if not number.isdecimal():
        raise UnknownJobError(f"{target} is neither a run folder nor a job id")
    for job in slurm_commands.list_jobs([int(number)]):
        folder_found = folder_of(job)
        if folder_found is None:
            raise UnknownJobError(f"job {target} ({job.name}) was not started by `medvlp submit`")
        return folder_found, int(number)
    raise UnknownJobError(
        f"Slurm does not know job {target} (any more): name its run folder instead; `medvlp runs` lists them"
    )


def unfinished(jobs: Iterable[Job]) -> list[Job]:
    """Those that run, wait, or come back."""
    return [job for job in jobs if not job.is_over]
