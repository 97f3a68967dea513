"""Checkpoints: collect state, write it under a temporary name, close it with a manifest, rename.

A reader sees either a whole checkpoint or none. Collecting (on all ranks, at a step boundary) is apart from
writing, so that a background thread can take over the writing.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import nn

from medvlp import distributed
from medvlp.config import CheckpointConfig
from medvlp.training.errors import CheckpointError
from medvlp.training.manifest import MANIFEST, Manifest, newest_valid, step_folder, step_folders
from medvlp.training.state_files import StateFile, checksum, fsync_folder

__all__ = ["LATEST", "WEIGHTS", "commit", "load_weights", "newest_valid", "prepare", "prune", "write"]

#: All weights of the method, whole and in float32, whatever the ZeRO stage and precision.
WEIGHTS = "weights.safetensors"
#: File with the name of the newest checkpoint's folder, for people and scripts (resuming does not trust it).
LATEST = "latest"


def load_weights(checkpoint: Path | str, method: nn.Module) -> None:
    """Load a checkpoint's weights into a method built from the same config.

    Args:
        checkpoint: a checkpoint folder (for example from `newest_valid`).
        method: its parameters and buffers are overwritten.

    Raises:
        CheckpointError: no weights there, or they do not fit the method.
    """
    path = Path(checkpoint) / WEIGHTS
    try:
        weights = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from error
    try:
        method.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path} does not fit this config's method: {reason[:400]}") from error


def prepare(checkpoints: Path, step: int) -> Path:
    """Make an empty folder with a temporary name for the checkpoint of `step`; a collective."""
    folder = checkpoints / f".{step_folder(step)}.partial"

    def make() -> None:
        for leftover in checkpoints.glob(".step-*.partial"):
            shutil.rmtree(leftover)
        folder.mkdir(parents=True)

    together(make if distributed.is_main() else lambda: None, f"{folder} cannot be made")
    return folder


def write(folder: Path, files: Sequence[StateFile]) -> dict[str, dict[str, Any]]:
    """Write this rank's files below `folder`, durably; all ranks call this together.

    What a full disk has let through is deleted again: it would be in the way of making room.

    Returns:
        The manifest's entries of all ranks' files.

    Raises:
        CheckpointError: a file could not be written on some rank (disk full, no permission).
    """
    entries: dict[str, dict[str, Any]] = {}

    def write_all() -> None:
        for file in files:
            file.write()
            name = file.path.relative_to(folder).as_posix()
            entries[name] = {"bytes": file.path.stat().st_size, "xxh3_128": checksum(file.path)}
        for parent in {file.path.parent for file in files}:
            fsync_folder(parent)

    try:
        together(write_all, f"the checkpoint cannot be written to {folder.parent}")
    except CheckpointError:
        if distributed.is_main():
            shutil.rmtree(folder, ignore_errors=True)
        raise
    return {name: entry for of_rank in distributed.gather_objects(entries) for name, entry in of_rank.items()}


def commit(folder: Path, manifest: Manifest, config: CheckpointConfig) -> Path:
    """Close a written checkpoint with its manifest, give it its name, point `latest` at it, delete old ones.

    All ranks call this together; rank 0 acts.

    Raises:
        CheckpointError: the disk refused a step of it.
    """
    checkpoints = folder.parent
    final = checkpoints / step_folder(manifest.step)

    def close() -> None:
        manifest.created = datetime.now(UTC).isoformat(timespec="seconds")
        _write_text(folder / MANIFEST, manifest.to_json())
        fsync_folder(folder)
        if final.exists():  # a damaged one that this run fell back behind, or one without a manifest
            remove(final)
        folder.rename(final)
        fsync_folder(checkpoints)
        _write_text(checkpoints / f".{LATEST}.partial", final.name + "\n")
        (checkpoints / f".{LATEST}.partial").replace(checkpoints / LATEST)
        fsync_folder(checkpoints)
        prune(checkpoints, manifest.step, config)

    together(close if distributed.is_main() else lambda: None, f"{final} cannot be finished")
    return final


def prune(checkpoints: Path, step: int, config: CheckpointConfig) -> None:
    """Delete what `keep_last` and `keep_every` do not keep, and checkpoints beyond `step`.

    A run that fell back behind damaged checkpoints has left those beyond.
    """
    folders = step_folders(checkpoints)
    past = [(number, path) for number, path in folders if number <= step]
    kept = {path for _, path in (past[-config.keep_last :] if config.keep_last else past)}
    kept |= {path for number, path in past if config.keep_every and number % config.keep_every == 0}
    for _, path in folders:
        if path not in kept:
            remove(path)


def remove(folder: Path) -> None:
    """Delete a checkpoint, its manifest first: a half-deleted one must not look whole."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder)


def together(action: Any, failure: str) -> None:
    """Run `action` on every rank; if it fails on any, raise `CheckpointError` on all of them."""
    problem = None
    try:
        action()
    except OSError as error:
        problem = error.strerror or str(error)
    problems = distributed.gather_objects(problem)
    failed = [rank for rank, text in enumerate(problems) if text]
    if failed:
        raise CheckpointError(
            f"{failure}: {problems[failed[0]]} (rank {failed[0]}). Earlier checkpoints are untouched; "
            "make room or give another run.dir, and start again"
        )


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
