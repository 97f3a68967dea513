"""Jobs of one command on one node, and arrays of them: building, merging, evaluating, serving."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from launcher.run_state import SLURM_FOLDER
from launcher.slurm import slurm_commands
from launcher.slurm.cluster_config import ClusterConfig
from launcher.slurm.render import EARLY_SECONDS, SlurmRequest, directives, in_container, program, render
from launcher.slurm.submit import job_folders, note_submission, write_job_file

#: Starts in a row that finish nothing up to their time limit, after which a job stops.
FRUITLESS = 2


@dataclass(frozen=True)
class CommandJob:
    """One command, or an array with a command for each task.

    Attributes:
        kind: what it is for; names its script and stands in the record.
        folder: run folder or dataset it works for; script, record and output go below `slurm/` in it.
        request: what is asked of Slurm; `array` is filled in.
        site: the cluster's settings.
        commands: words behind `medvlp`, for each task of the array.
        parts: the array's tasks run the one command, each with its `--part i/n`.
        at_once: tasks of the array that may run at the same time; None: all.
        finished: for each command, words of `find` for the files of what it will not do again. Such a command
            is warned and asked to stop, and requeued as often as the site allows, while its starts leave new
            ones. Without, it is ended at its time limit.
    """

    kind: str
    folder: Path
    request: SlurmRequest
    site: ClusterConfig
    commands: Sequence[Sequence[str]]
    parts: int | None = None
    at_once: int | None = None
    finished: Sequence[Sequence[str]] = ()

    @property
    def tasks(self) -> int | None:
        """Tasks of the array; None for a single job."""
        return self.parts or (len(self.commands) if len(self.commands) > 1 else None)

    def script(self) -> str:
        """The text of the batch script."""
        srun_options, words = in_container(self.site, self.request.gpus_per_node > 0)
        tasks = self.tasks
        limit = f"%{self.at_once}" if self.at_once else ""
        request = replace(self.request, array=f"0-{tasks - 1}{limit}" if tasks else None)
        if not self.finished:  # the warning would only end it
            request = replace(request, signal_seconds=None)
        return render(
            "command.sbatch.j2",
            directives=directives(request),
            version=metadata.version("medvlp"),
            site=self.site,
            folders=job_folders(self.site),
            commands=[list(map(str, command)) for command in self.commands],
            is_array=tasks is not None,
            parts=self.parts,
            program=program(self.site),
            container_srun=srun_options,
            container_words=words,
            folder=self.folder,
            max_requeues=self.site.sbatch.max_requeues if self.finished else None,
            finished=self.finished,
            fruitless=FRUITLESS,
            at_limit=(request.signal_seconds or 0) + EARLY_SECONDS,
            gpus_per_node=self.request.gpus_per_node,
            cpus_per_task=self.request.cpus_per_task,
        )


def submit_command(job: CommandJob, arguments: Sequence[str]) -> int:
    """Write the script, submit and note it; the id of the job or array.

    Args:
        arguments: the command line, for the record.

    Raises:
        SubmitError: the folder cannot be written.
        SlurmError: Slurm refused.
    """
    script = write_job_file(job.folder / SLURM_FOLDER / f"{job.kind}.sbatch", job.script())
    job_id = slurm_commands.submit(script)
    note_submission(job.folder, job_id, job.kind, arguments, tasks=job.tasks)
    return job_id


def after(job_ids: Sequence[int], extra: Sequence[str] = ()) -> dict[str, object]:
    """Values of `build_request` for a job that starts when others ended well, and never if one did not."""
    ids = ":".join(map(str, job_ids))
    return {"dependency": f"afterok:{ids}", "extra": ["--kill-on-invalid-dep=yes", *extra]}
