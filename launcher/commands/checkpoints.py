"""`medvlp checkpoints`: what checkpoints a run has, whether they are whole, and other forms of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from launcher.console import Console, echo
from shards.errors import UsageError

if TYPE_CHECKING:
    from medvlp.runs.manifest import Manifest


def checkpoints(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="run folder")],
    verify: Annotated[
        bool,
        typer.Option("--verify", help="read every file and compare its checksum; exit 4 if one is damaged"),
    ] = False,
    step: Annotated[
        int | None, typer.Option("--step", help="checkpoint to convert; default: the newest good one")
    ] = None,
    universal: Annotated[
        Path | None,
        typer.Option("--to-universal", help="write it as a DeepSpeed universal checkpoint to this folder"),
    ] = None,
    plain: Annotated[
        Path | None,
        typer.Option("--to-safetensors", help="write weights and optimiser state, whole, to this folder"),
    ] = None,
    prune: Annotated[
        bool, typer.Option("--prune", help="delete what checkpoint.keep_* of the run's config does not keep")
    ] = False,
    keep_last: Annotated[
        int | None, typer.Option("--keep-last", min=1, help="with --prune: stands above checkpoint.keep_last")
    ] = None,
) -> None:
    """List the checkpoints of a run; verify, convert or prune them."""
    from medvlp.runs.checkpoint import Checkpoint
    from medvlp.runs.conversion import to_safetensors, to_universal
    from medvlp.runs.errors import CheckpointError, RunFolderError
    from medvlp.runs.manifest import step_folder

    folder = run / "checkpoints"
    if not folder.is_dir():
        raise RunFolderError(f"{run} is no run folder: it has no folder checkpoints/")
    if keep_last is not None and not prune:
        raise UsageError("--keep-last says what --prune keeps; give both")
    if step is not None and universal is None and plain is None:
        raise UsageError("--step says what is converted: give --to-universal or --to-safetensors too")
    if prune:
        _prune(run, keep_last)
    if universal is not None or plain is not None:
        newest = Checkpoint.find(run) if step is None else None
        source = None if newest is None else newest.folder
        if step is not None:
            source = folder / step_folder(step)
        if source is None or not source.is_dir():
            raise CheckpointError(f"{folder} has no checkpoint{'' if step is None else f' of step {step}'}")
        for convert, out in ((to_universal, universal), (to_safetensors, plain)):
            if out is not None:
                convert(source, out)
                echo(f"{source.name} -> {out}")
    damaged = _list(run, verify)
    if damaged:
        raise CheckpointError(f"{len(damaged)} of the checkpoints in {folder} cannot be used: {damaged[0]}")


def _list(run: Path, verify: bool) -> list[str]:
    """Print the table; returns what is wrong, if it was looked for."""
    from medvlp.runs.errors import CheckpointError, UnreadableError
    from medvlp.runs.manifest import Manifest, step_folders

    table = Table(title=escape(f"checkpoints of {run}"))
    for column in ("step", "epoch", "size", "created", "ranks", "ZeRO", "loss", "state"):
        table.add_column(column, justify="left" if column in ("created", "state") else "right")
    problems = []
    for step, folder in step_folders(run / "checkpoints"):
        row, problem, fault = (str(step), *[""] * 6), None, "damaged"
        try:
            manifest = Manifest.read(folder)
            row = _row(manifest)
            problem = manifest.problem(folder, list(manifest.files)) if verify else _missing(manifest, folder)
        except (UnreadableError, OSError) as error:
            problem, fault = str(error), "unreadable"
        except CheckpointError as error:
            problem = str(error)
        if problem:
            problems.append(problem)
        good = "verified" if verify else "complete"
        table.add_row(*map(escape, (*row, f"{fault}: {problem}" if problem else good)))
    Console(soft_wrap=False).print(table)
    return problems if verify else []


def _missing(manifest: Manifest, folder: Path) -> str | None:
    """What sizes alone tell, without reading the files."""
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            return f"{path} is missing or has another size"
    return None


def _row(manifest: Manifest) -> tuple[str, ...]:
    size = sum(entry["bytes"] for entry in manifest.files.values())
    loss = manifest.metrics.get("loss")
    return (
        str(manifest.step), str(manifest.epoch), f"{size / 1e6:.1f} MB", manifest.created,
        str(manifest.world_size), str(manifest.zero_stage), "" if loss is None else f"{loss:.4f}",
    )  # fmt: skip


def _prune(run: Path, keep_last: int | None) -> None:
    """Hold the run meanwhile: what a training finishes after the look at its newest would be deleted."""
    from launcher.slurm.slurm_commands import job_is_over
    from medvlp.runs.errors import RunFolderError
    from medvlp.runs.run_lock import RunLock, this_process

    lock = RunLock(run, this_process(None), job_is_over, key="RUN")
    try:
        lock.acquire()
        try:
            _delete(run, keep_last)
        finally:
            lock.release()
    except OSError as error:
        raise RunFolderError(f"{run} cannot be pruned: {error.filename}: {error.strerror}") from error


def _delete(run: Path, keep_last: int | None) -> None:
    from medvlp import config_files, trust
    from medvlp.methods.registry import schemas
    from medvlp.runs.checkpoint import Checkpoint
    from medvlp.runs.errors import CheckpointError
    from medvlp.runs.retention import prune
    from medvlp.runs.run_folder import CONFIG

    newest = Checkpoint.find(run)
    if newest is None:
        raise CheckpointError(f"{run} has no checkpoint to keep")
    own = config_files.RunFile(run / CONFIG, run)
    config = config_files.load([own], [], schemas(), unused=trust.KEYS).checkpoint
    if keep_last is not None:
        config.keep_last = keep_last
    # Damaged ones count for nothing; what lies beyond the newest good one is damaged.
    for folder in prune(newest.folder.parent, newest.step, config):
        echo(f"deleted {folder}")
