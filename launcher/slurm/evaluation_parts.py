"""Parts of an evaluation by an array: `RUN/evaluation-parts/*.json`, which its dependent job joins.

The jobs of an array over several runs stand in the first run's record. That they write into the others too is
noted there, in `evaluation-parts/jobs.jsonl`.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from launcher.json_lines import newest_first
from launcher.run_state import PARTS_FOLDER, SUBMISSIONS
from launcher.slurm import slurm_commands
from launcher.slurm.command_jobs import CommandJob, submit_command
from launcher.slurm.run_jobs import submitted_id, unfinished, unfinished_job, works_for
from launcher.slurm.slurm_commands import Job
from launcher.slurm.submit import SubmitError


def submit_array(job: CommandJob, runs: Sequence[Path], arguments: Sequence[str]) -> int:
    """Submit the job that writes parts of these runs, which take the place of earlier ones; its id.

    Args:
        runs: the first is the job's folder.
        arguments: the command line, for the record.

    Raises:
        SubmitError: another evaluation of a run waits or runs, or a folder cannot be written.
        SlurmError: Slurm refused.
    """
    for run in runs:
        if (alive := _unfinished(run)) is not None:
            job_id = submitted_id(alive)
            raise SubmitError(
                f"job {job_id} ({alive.name}), an evaluation of {run}, is {alive.state.lower()}: wait for "
                f"its end, or medvlp cancel {job_id}"
            )
    with _earlier_parts_away(runs):
        job_id = submit_command(job, arguments)
    note(job.folder, runs[1:], job_id)
    return job_id


def note(folder: Path, runs: Sequence[Path], job_id: int) -> None:
    """Note a job of `folder` with the other runs whose parts it writes or joins.

    Raises:
        SubmitError: it cannot be written; the job waits in the queue nevertheless.
    """
    for run in runs:
        path = run / PARTS_FOLDER / SUBMISSIONS
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"job_id": job_id, "folder": str(folder)}) + "\n")
        except OSError as error:
            raise SubmitError(
                f"job {job_id} is submitted but cannot be noted in {path}: {error.strerror}"
            ) from error


def _unfinished(run: Path) -> Job | None:
    """A job that waits or runs and writes or joins parts of a run: its own, or noted by another run's."""
    own = unfinished_job(run, ("evaluate", "compare"))
    if own is not None:
        return own
    lines = newest_first(run / PARTS_FOLDER / SUBMISSIONS)
    noted = {
        line["job_id"]: Path(str(line.get("folder"))) for line in lines if type(line.get("job_id")) is int
    }
    jobs = unfinished(slurm_commands.list_jobs(list(noted))) if noted else []
    return next((job for job in jobs if (of := noted.get(submitted_id(job))) and works_for(job, of)), None)


@contextmanager
def _earlier_parts_away(runs: Sequence[Path]) -> Iterator[None]:
    """What earlier arrays left is deleted where the new one is submitted, and put back where it is not.

    It is out of the way before: a job may write its first part before sbatch has answered.
    """
    away: dict[Path, Path] = {}
    try:
        for run in runs:
            (run / PARTS_FOLDER).mkdir(exist_ok=True)
            for part in (run / PARTS_FOLDER).glob("*.json"):
                away[part] = part.replace(part.with_suffix(".earlier"))
        yield
    except BaseException as error:
        for part, moved in away.items():
            moved.replace(part)
        if isinstance(error, OSError):
            raise SubmitError(f"{error.filename} cannot be written: {error.strerror}") from error
        raise
    for moved in away.values():
        moved.unlink()
