"""Writing a checkpoint: under a temporary name, closed with a manifest, renamed.

A reader sees either a whole checkpoint or none. Nothing here talks to other ranks: `checkpoint_writer.py`
does.
"""

import logging
import os
import shutil
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from medvlp.config import CheckpointConfig
from medvlp.runs.errors import UnreadableError
from medvlp.runs.manifest import MANIFEST, Manifest, step_folder
from medvlp.runs.retention import drop_beyond, drop_surplus, remove
from medvlp.runs.state_files import StateFile
from shards.atomic import fsync_path

logger = logging.getLogger(__name__)

#: File with the name of the newest checkpoint's folder, for people and scripts (resuming does not trust it).
LATEST = "latest"


def partial_folder(checkpoints: Path, step: int) -> Path:
    """Temporary name of the folder of the checkpoint of `step`."""
    return checkpoints / f".{step_folder(step)}.partial"


def clear_partial(checkpoints: Path) -> None:
    """Delete what writes that were cut off have left.

    Raises:
        OSError: the disk refused.
    """
    for leftover in checkpoints.glob(".step-*.partial"):
        shutil.rmtree(leftover)


def write(
    folder: Path, files: Sequence[StateFile], given_up: Callable[[], bool] = lambda: False
) -> dict[str, dict[str, Any]]:
    """Write this rank's files below `folder`, durably.

    Args:
        folder: from `partial_folder`; made where it is missing.
        files: their paths lie below `folder`.
        given_up: see `StateFile.write`.

    Returns:
        The manifest's entries of these files.

    Raises:
        OSError: a file could not be written (disk full, no permission).
    """
    entries = {file.path.relative_to(folder).as_posix(): file.write(given_up) for file in files}
    for parent in {file.path.parent for file in files}:
        fsync_path(parent)
    return entries


def commit(folder: Path, manifest: Manifest, config: CheckpointConfig) -> Path:
    """Close a written checkpoint with its manifest, give it its name, point `latest` at it, delete old ones.

    Can be called again after an error. An old one that the config does not keep may stay, with a warning:
    the disk refuses to delete it, or to tell the best now.

    Args:
        folder: from `partial_folder`, with all ranks' files.
        manifest: with all ranks' entries; its `created` is set.
        config: says which checkpoints are kept.

    Raises:
        OSError: the disk refused a step of it, or to delete a checkpoint beyond this one.
    """
    checkpoints = folder.parent
    final = checkpoints / step_folder(manifest.step)
    if folder.exists():  # else an earlier call came this far
        manifest.created = datetime.now(UTC).isoformat(timespec="seconds")
        _write_text(folder / MANIFEST, manifest.to_json())
        fsync_path(folder)
        if final.exists():  # a damaged one that this run fell back behind, or one without a manifest
            remove(final)
        folder.rename(final)
    fsync_path(checkpoints)
    _write_text(checkpoints / f".{LATEST}.partial", final.name + "\n")
    (checkpoints / f".{LATEST}.partial").replace(checkpoints / LATEST)
    fsync_path(checkpoints)
    drop_beyond(checkpoints, manifest.step)
    try:
        drop_surplus(checkpoints, config)
    except (OSError, UnreadableError) as error:
        logger.warning("old checkpoints stay, which is tried again at the next one: %s", error)
    return final


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
