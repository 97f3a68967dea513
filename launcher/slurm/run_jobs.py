"""Which Slurm jobs belong to which run folder, and what `medvlp jobs` shows of them."""

import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from launcher.json_lines import newest_first
from launcher.run_state import CONFIG, SLURM_FOLDER, SUBMISSIONS, RunState, is_run_folder, read_run
from launcher.slurm import accounting, slurm_commands
from launcher.slurm.accounting import PastRun
from launcher.slurm.slurm_commands import Job, SlurmError
from medvlp.runs.events import EVENTS
from shards.errors import UsageError

#: `kind` of a submission that trains.
TRAINING = "pretrain"
#: What is shown for a further component of its job.
BESIDE = "beside"
#: How long Slurm may leave a question unanswered: a restart of slurmctld, a limit on their rate.
_UNANSWERED_SECONDS = 300.0


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


def works_for(job: Job, folder: Path) -> bool:
    """Whether Slurm says so; ids that a folder names may be others' jobs by now, or of another cluster."""
    found = folder_of(job)
    return found is not None and found.resolve() == folder.resolve()


def unfinished_job(folder: Path, kinds: Sequence[str]) -> Job | None:
    """A job of these kinds that was submitted for a folder and waits or runs; None without one."""
    known = [int(line["job_id"]) for line in submissions(folder) if line.get("kind") in kinds]
    jobs = slurm_commands.list_jobs(known) if known else []
    return next((job for job in unfinished(jobs) if works_for(job, folder)), None)


def trains(job: Job, folder: Path) -> bool:
    """Whether a job of a folder trains its run: others evaluate or serve it."""
    return not job.het_job_offset and kind_of(folder, submitted_id(job)) == TRAINING


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
        named = [job for job in known if submitted_id(job) == line["job_id"]]
        current = [job for job in named if works_for(job, folder)]
        kind = str(line.get("kind") or "")
        if named and not current:  # the records would tell of the other job too
            yield RunJob(int(line["job_id"]), str(line["job_id"]), kind, folder, None, [], run)
            continue
        for job in current:
            shown = BESIDE if job.het_job_offset else kind
            yield RunJob(submitted_id(job), label_of(job), shown, folder, job, [], run)
        for label, past in _forgotten(int(line["job_id"]), current, line.get("tasks")).items():
            shown = kind if label.partition("+")[2] in ("", "0") else BESIDE
            yield RunJob(int(line["job_id"]), label, shown, folder, None, past, run)


def _forgotten(job_id: int, current: Sequence[Job], tasks: Any) -> dict[str, list[PastRun]]:
    """By label the runs of what the controller has forgotten of a job: all, or finished tasks of an array."""
    if current and not tasks:
        return {}
    known = {label_of(job) for job in current}
    found: dict[str, list[PastRun]] = {}
    for past in accounting.past_runs(job_id):
        if past.job_id not in known and not (current and past.state == "PENDING"):
            found.setdefault(past.job_id, []).append(past)
    return found if found or current else {str(job_id): []}


def state_of(folder: Path) -> RunState | None:
    """The state of the run in a folder; None for a dataset, or a folder that cannot be read."""
    try:
        if not (folder / CONFIG).is_file() and not (folder / EVENTS).is_file():
            return None
        return read_run(folder, measure_size=False)
    except OSError:
        return None


class Target(NamedTuple):
    """What a user means by a run folder or a job id.

    Attributes:
        folder: that the jobs work for.
        job: id that sbatch printed, where one was named.
        task: of this array, where one was named.
    """

    folder: Path
    job: int | None = None
    task: int | None = None

    @property
    def label(self) -> str:
        """The job as squeue writes it."""
        return f"{self.job}" if self.task is None else f"{self.job}_{self.task}"

    def jobs(self) -> list[Job]:
        """Those of the named job (or task) that the controller knows; none where only a folder was named."""
        found = [] if self.job is None else _known(self.job, self.task)
        return [job for job in found if works_for(job, self.folder)]


def _known(job_id: int, task: int | None) -> list[Job]:
    jobs = slurm_commands.list_jobs([job_id])
    return [job for job in jobs if task is None or _has_task(job, task)]


def _has_task(job: Job, task: int) -> bool:
    """Whether a job is this task of its array, or stands for several that wait, with it among them."""
    if job.array_task_id is not None:
        return job.array_task_id == task
    waiting = re.findall(r"(\d+)(?:-(\d+))?", job.array_tasks.partition("%")[0])
    # Slurm cuts a long list short.
    return "..." in job.array_tasks or any(int(low) <= task <= int(high or low) for low, high in waiting)


def find(text: str) -> Target:
    """The folder, and the job or task of an array if one was named, that a user means.

    Raises:
        UnknownJobError: neither, or a job that is not of `medvlp submit`.
        UsageError: a folder nothing was submitted for.
    """
    if Path(text).is_dir():
        folder = Path(text)
        if not is_run_folder(folder) and not (folder / SLURM_FOLDER / SUBMISSIONS).is_file():
            raise UsageError(f"{text} is no run folder, and no job was submitted for it")
        return Target(folder)
    named = re.fullmatch(r"([0-9]+)(?:_([0-9]+))?", text)
    if named is None:
        raise UnknownJobError(f"{text} is neither a run folder nor the id of a job (12) or of a task (24_3)")
    job_id, task = int(named[1]), None if named[2] is None else int(named[2])
    for job in _known(job_id, task):
        folder_found = folder_of(job)
        if folder_found is None:
            raise UnknownJobError(f"job {text} ({job.name}) was not started by `medvlp submit`")
        return Target(folder_found, job_id, task)
    raise UnknownJobError(
        f"Slurm does not know job {text} (any more): name its run folder instead; `medvlp runs` lists them"
    )


def question(job_id: int, task: int | None = None) -> Callable[[], bool]:
    """Asks whether a job (or task) has ended for good; a controller that is away for a while counts as "no".

    Its answer raises SlurmError after `_UNANSWERED_SECONDS` without one of Slurm.
    """
    unanswered_since: float | None = None

    def ask() -> bool:
        nonlocal unanswered_since
        try:
            answer = slurm_commands.has_ended(job_id, task)
        except SlurmError:
            unanswered_since = unanswered_since or time.monotonic()
            if time.monotonic() - unanswered_since > _UNANSWERED_SECONDS:
                raise
            return False
        unanswered_since = None
        return answer

    return ask


def unfinished(jobs: Iterable[Job]) -> list[Job]:
    """Those that run, wait, or come back."""
    return [job for job in jobs if not job.is_over]
