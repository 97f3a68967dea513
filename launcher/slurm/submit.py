"""Submitting a pre-training: checks, the job script in the run folder, sbatch, and the record of it."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import xxhash

from launcher.run_state import SLURM_FOLDER, SUBMISSIONS
from launcher.slurm import slurm_commands
from launcher.slurm.cluster_config import ClusterConfig
from launcher.slurm.heterogeneous import Beside, component_directives
from launcher.slurm.render import SlurmRequest, directives, in_container, program, render
from launcher.slurm.run_jobs import TRAINING, unfinished_job
from shards.atomic import atomic_write
from shards.errors import DataError, MedvlpError, UsageError

#: Below RUN/slurm: the script, and the config of the newest submission, with which a resume goes on.
SCRIPT, CONFIG = "job.sbatch", "config.yaml"

#: How long before the time limit ranks that still save are ended, at most.
MARGIN_SECONDS = 30


class SubmitError(MedvlpError):
    """The run folder cannot take a job: it cannot be written, or another job of it is still there."""

    exit_code = 4


@dataclass(frozen=True)
class PretrainJob:
    """A pre-training as a job.

    Attributes:
        request: what is asked of Slurm.
        site: the cluster's settings.
        run_dir: absolute path of the run folder.
        config: the resolved config as YAML.
        ranks_per_node: processes of each node.
        max_requeues: how often the job may be requeued.
        preflight: look at every node before the ranks start.
        beside: what runs on a node of its own next to the training; None: nothing.
        said: overrides that repeat the user's word for what the config names outside the run folder, whose
            copy of the config is not enough for that (`medvlp.trust`).
    """

    request: SlurmRequest
    site: ClusterConfig
    run_dir: Path
    config: str
    ranks_per_node: int
    max_requeues: int
    preflight: bool = False
    beside: Beside | None = None
    said: Sequence[str] = ()

    @property
    def config_file(self) -> Path:
        """The copy of the config that the job reads at every start.

        It is named by its content: a later submission, or one that Slurm refuses, changes no job that waits,
        runs or is requeued.
        """
        return self.run_dir / SLURM_FOLDER / f"config-{xxhash.xxh3_64_hexdigest(self.config.encode())}.yaml"

    def script(self) -> str:
        """The text of the batch script."""
        has_gpus = self.request.gpus_per_node > 0
        srun_options, words = in_container(self.site, has_gpus)
        folders = job_folders(self.site)
        return render(
            "pretrain.sbatch.j2",
            directives=directives(self.request)
            + ([] if self.beside is None else component_directives(self.beside.request)),
            version=metadata.version("medvlp"),
            site=self.site,
            folders=folders,
            run_dir=self.run_dir,
            arguments=[self.config_file, *self.said],
            program=program(self.site),
            container_srun=srun_options,
            container_words=words,
            nodes=self.request.nodes,
            gpus_per_node=self.request.gpus_per_node,
            cpus_per_task=self.request.cpus_per_task,
            ranks_per_node=self.ranks_per_node,
            max_requeues=self.max_requeues,
            margin=min(MARGIN_SECONDS, (self.request.signal_seconds or 0) // 4),
            preflight=self.preflight,
            exclude=self.request.exclude,
            beside=None if self.beside is None else self.beside.words,
        )


def job_folders(site: ClusterConfig) -> dict[str, str]:
    """Variable -> node-local folder that a job exports and makes on each node."""
    places = {
        "TMPDIR": site.folders.tmp,
        "MEDVLP_CACHE_DIR": site.folders.data_cache,
        "HF_HOME": site.folders.hf_home,
        "TRITON_CACHE_DIR": site.folders.triton_cache,
        "TORCH_EXTENSIONS_DIR": site.folders.torch_extensions,
    }
    return {name: place for name, place in places.items() if place}


def job_log(folder: Path, is_array: bool = False) -> Path:
    """Where the output of a folder's jobs goes, as sbatch writes it.

    `%j` is the job's id, `%A_%a` the array's and the task's.

    Raises:
        UsageError: the folder's name would be a pattern too.
    """
    if "%" in str(folder):
        raise UsageError(f"{folder}: sbatch takes % for a pattern: rename the folder")
    return folder / SLURM_FOLDER / ("job-%A_%a.out" if is_array else "job-%j.out")


def submit_pretrain(job: PretrainJob, arguments: Sequence[str]) -> int:
    """Write the script and the config into the run folder, submit, and note it; the job id.

    Args:
        arguments: the command line, for the record.

    Raises:
        SubmitError: the run folder cannot be written, or one of its jobs is still there.
        SlurmError: Slurm refused.
    """
    refuse_second_job(job.run_dir, job.request.dependency)
    folder = job.run_dir / SLURM_FOLDER
    script = write_job_file(folder / SCRIPT, job.script())
    write_job_file(job.config_file, job.config)
    job_id = slurm_commands.submit(script)
    note_submission(job.run_dir, job_id, TRAINING, arguments, ranks=job.request.nodes * job.ranks_per_node)
    write_job_file(folder / CONFIG, job.config)
    return job_id


def write_job_file(path: Path, text: str) -> Path:
    """Write a file of a job below RUN/slurm.

    Raises:
        SubmitError: the folder cannot be made or written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, text.encode())
    except (OSError, DataError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise SubmitError(f"cannot write {path}: {reason}; choose another run.dir") from error
    return path


def refuse_second_job(run_dir: Path, dependency: str | None = None) -> None:
    """Two jobs must not write one run folder at the same time (those that evaluate or serve it do not).

    Raises:
        SubmitError: a job of this run waits or runs, and no dependency says which comes first.
    """
    alive = unfinished_job(run_dir, (TRAINING,)) if dependency is None else None
    if alive is not None:
        raise SubmitError(
            f"job {alive.id} of {run_dir} is {alive.state.lower()}: cancel it first "
            f"(medvlp cancel {run_dir}), or give --dependency afterany:{alive.id}"
        )


def note_submission(run_dir: Path, job_id: int, kind: str, arguments: Sequence[str], **more: Any) -> None:
    """Append a line to RUN/slurm/jobs.jsonl.

    Args:
        kind: "pretrain", "evaluate", ...
        arguments: the command line, without the program.
        more: further keys of the line.

    Raises:
        SubmitError: it cannot be written; the job waits in the queue nevertheless.
    """
    path = run_dir / SLURM_FOLDER / SUBMISSIONS
    line = {
        "job_id": job_id,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "kind": kind,
        "arguments": list(arguments),
        "user": os.environ.get("USER", ""),
        **more,
    }
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        raise SubmitError(
            f"job {job_id} is submitted but cannot be noted in {path}: {error.strerror}"
        ) from error
