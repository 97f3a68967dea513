"""What a run folder says about its run: how far it is, how fast, how it stands. Needs no torch."""

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from launcher.json_lines import newest, newest_first
from medvlp.runs.errors import CheckpointError, UnreadableError
from medvlp.runs.events import EVENTS
from medvlp.runs.manifest import EXPORTED_HEADS, Manifest, step_folders
from shards.strict_json import read_limited
from shards.strict_yaml import YAML_LIMIT, parse_yaml

#: Codes of `medvlp pretrain` (see medvlp/training/README.md) and of the other commands (launcher/README.md).
MEANINGS = {
    0: "finished",
    1: "unexpected error",
    2: "wrong command line or config",
    3: "data",
    4: "checkpoint or run folder",
    5: "too many bad steps in a row",
    6: "lost another rank",
    7: "a rank did not arrive in time",
    8: "Slurm refused or did not answer",
    9: "the doctor found what a run would not survive",
    10: "the doctor found bad nodes",
    11: "the prototype server refused or did not answer",
    75: "interrupted after a checkpoint",
}


def meaning(code: int) -> str:
    """`7` -> "a rank did not arrive in time"; `137` -> "killed by SIGKILL"; `99` -> "exit code 99"."""
    if code in MEANINGS:
        return MEANINGS[code]
    if code > 128:
        try:
            return f"killed by {signal.Signals(code - 128).name}"
        except ValueError:
            return f"exit code {code}"
    return f"exit code {code}"


METRICS = "metrics.jsonl"
CONFIG = "config.yaml"
#: Of a run's Slurm jobs, below the run folder.
SLURM_FOLDER = "slurm"
SUBMISSIONS = "jobs.jsonl"
ATTEMPTS = "attempts.jsonl"
#: Below the run folder: a result file for each task that was evaluated by a job of its own.
PARTS_FOLDER = "evaluation-parts"

#: `train.step_timeout_seconds` of a run whose config does not say it.
_STEP_TIMEOUT_SECONDS = 600.0
_BOUNDARY_EVENTS = ("start", "resume", "interrupt", "finish")


@dataclass(frozen=True)
class CheckpointFacts:
    """One finished checkpoint, from its manifest."""

    step: int
    created: str
    bytes: int
    metrics: dict[str, float]
    wandb_run_id: str | None


@dataclass(frozen=True)
class RunState:
    """What is known of a run.

    Attributes:
        folder: the run folder.
        name, method: as in its config; "" when it has none yet.
        state: "finished", "running", "interrupted", "failed" or "new" (nothing has started in it).
        reason: of "failed" and "interrupted"; else "".
        step, steps, epoch: last logged or saved step; steps in all; epoch from 0. None: not known yet.
        samples_per_second, step_seconds, loss: of the last logged step.
        best_metric, best: `checkpoint.keep_best` of the config (or "loss"), and its best value in the
            checkpoints there.
        checkpoint: the newest checkpoint.
        bytes: of all files in the folder.
        updated: seconds since 1970 when the run last wrote something; None for "new".
        attempts: lines of slurm/attempts.jsonl, newest first.
    """

    folder: Path
    name: str = ""
    method: str = ""
    state: str = "new"
    reason: str = ""
    step: int | None = None
    steps: int | None = None
    epoch: int | None = None
    samples_per_second: float | None = None
    step_seconds: float | None = None
    loss: float | None = None
    best_metric: str = "loss"
    best: float | None = None
    checkpoint: CheckpointFacts | None = None
    bytes: int = 0
    updated: float | None = None
    attempts: list[dict[str, Any]] = field(default_factory=list)

    @property
    def wandb_run_id(self) -> str | None:
        """The W&B run that a resume continues."""
        return None if self.checkpoint is None else self.checkpoint.wandb_run_id

    @property
    def eta_seconds(self) -> float | None:
        """Time to the last step at the speed of the last logged ones; None when that is not known."""
        if self.step is None or self.steps is None or self.step_seconds is None:
            return None
        return max(0, self.steps - self.step) * self.step_seconds


def is_run_folder(folder: Path) -> bool:
    """Whether a run was started in this folder, or submitted to it (its config lies in slurm/ then).

    An export has a config too, and is none.
    """
    started = (folder / CONFIG).is_file() and not (folder / EXPORTED_HEADS).is_file()
    return started or (folder / SLURM_FOLDER / CONFIG).is_file()


def find_runs(root: Path) -> Iterator[Path]:
    """Every run folder at or below `root`, sorted; nothing is looked for inside one, nor behind links."""
    try:
        if is_run_folder(root):
            yield root
            return
        with os.scandir(root) as entries:
            folders = sorted(entry.path for entry in entries if entry.is_dir(follow_symlinks=False))
    except PermissionError:
        return
    for folder in folders:
        if not Path(folder).name.startswith("."):
            yield from find_runs(Path(folder))


def read_run(folder: Path, job_runs: bool | None = None, measure_size: bool = True) -> RunState:
    """Read a run folder, which may be written at this moment.

    Args:
        folder: the run folder.
        job_runs: whether Slurm has a job of it running; None when that cannot be asked. Without an answer a
            run counts as running that has written something within `train.step_timeout_seconds`: one that
            hangs for longer ends itself.
        measure_size: add up the sizes of all its files.

    Raises:
        OSError: a file is there and cannot be read.
    """
    config = _config(folder / CONFIG)
    logged = newest(folder / METRICS) or {}
    boundary, started = _last_boundary(folder / EVENTS)
    checkpoints = list(_checkpoints(folder))
    attempts = list(newest_first(folder / SLURM_FOLDER / ATTEMPTS))
    checkpoint_config = _section(config, "checkpoint")
    metric = str(checkpoint_config.get("keep_best") or "loss")
    values = [value for facts in checkpoints if (value := _number(facts.metrics.get(metric))) is not None]
    choose = (
        max if checkpoint_config.get("keep_best") and checkpoint_config.get("best_mode") == "max" else min
    )
    updated = max((_modified(folder / name) for name in (METRICS, EVENTS)), default=0.0) or None
    silence_limit = _number(_section(config, "train").get("step_timeout_seconds")) or _STEP_TIMEOUT_SECONDS
    state, reason = _state(boundary, attempts, job_runs, updated, silence_limit)
    steps = [
        value
        for value in (_count(logged.get("step")), *(facts.step for facts in checkpoints[-1:]))
        if value is not None
    ]
    return RunState(
        folder=folder,
        name=str(_section(config, "run").get("name") or folder.resolve().name),
        method=str(_section(config, "method").get("name") or ""),
        state=state,
        reason=reason,
        step=max(steps, default=None),
        steps=_count(started.get("steps")),
        epoch=_count(logged.get("epoch")),
        samples_per_second=_number(logged.get("samples_per_second")),
        step_seconds=_number(logged.get("step_seconds")),
        loss=_number(logged.get("loss")),
        best_metric=metric,
        best=choose(values, default=None),
        checkpoint=checkpoints[-1] if checkpoints else None,
        bytes=_size(folder) if measure_size else 0,
        updated=updated,
        attempts=attempts,
    )


def _state(
    boundary: dict[str, Any],
    attempts: list[dict[str, Any]],
    job_runs: bool | None,
    updated: float | None,
    silence_limit: float,
) -> tuple[str, str]:
    kind = boundary.get("kind")
    if job_runs:
        return "running", ""
    newest_attempt = attempts[0] if attempts else {}
    code = newest_attempt.get("exit_code")
    failure = ""
    if isinstance(code, int) and code != 0:
        failure = str(newest_attempt.get("reason") or meaning(code))
    if failure and kind in ("finish", "interrupt") and _began_after(newest_attempt, boundary):
        return "failed", failure  # started again, it ended before its first event
    if kind == "finish":
        return "finished", ""
    if kind == "interrupt":
        return "interrupted", str(boundary.get("by") or "")
    if kind is None and code is None:
        return "new", ""
    if job_runs is None and updated is not None and time.time() - updated < silence_limit:
        return "running", ""
    return "failed", failure or "ended without a word (killed, or its machine is gone)"


def _began_after(attempt: dict[str, Any], event: dict[str, Any]) -> bool:
    try:
        return datetime.fromisoformat(attempt["started"]) > datetime.fromisoformat(event["time"])
    except (KeyError, TypeError, ValueError):  # of another version, or without a time zone
        return False


def _last_boundary(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The newest start, resume, interrupt or finish; and the newest start or resume (it knows `steps`)."""
    last: dict[str, Any] = {}
    for event in newest_first(path):
        if str(event.get("kind")) not in _BOUNDARY_EVENTS:
            continue
        last = last or event
        if event["kind"] in ("start", "resume"):
            return last, event
    return last, {}


def _checkpoints(folder: Path) -> Iterator[CheckpointFacts]:
    """Finished checkpoints, oldest first; a damaged or vanishing one is passed over, see `read_run`."""
    for step, path in step_folders(folder / "checkpoints"):
        try:
            manifest = Manifest.read(path)
        except UnreadableError as error:
            raise error.__cause__ or error from None
        except CheckpointError:
            continue
        size = sum(int(entry["bytes"]) for entry in manifest.files.values())
        yield CheckpointFacts(step, manifest.created, size, manifest.metrics, manifest.wandb_run_id)


def _config(path: Path) -> dict[str, Any]:
    try:
        config = parse_yaml(read_limited(path, YAML_LIMIT).decode())
    except (FileNotFoundError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _number(value: Any) -> float | None:
    """The value, where it is a number at all: the files of a run may hold anything."""
    return value if type(value) is float or _count(value) is not None else None


def _count(value: Any) -> int | None:
    return value if type(value) is int and abs(value) < 2**53 else None


def _section(config: dict[str, Any], name: str) -> dict[str, Any]:
    section = config.get(name)
    return section if isinstance(section, dict) else {}


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _size(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size  # noqa: PTH118 - a Path a file is slow
            except OSError:  # deleted meanwhile
                continue
    return total
