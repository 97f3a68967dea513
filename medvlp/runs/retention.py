"""Which checkpoints of a run are kept, and how one is deleted."""

import shutil
from pathlib import Path

from medvlp.config import CheckpointConfig
from medvlp.runs.errors import CheckpointError, UnreadableError
from medvlp.runs.manifest import MANIFEST, VALIDATED, VALIDATION_PREFIX, Manifest, step_folders


def prune(checkpoints: Path, step: int, config: CheckpointConfig) -> list[Path]:
    """Delete what the config does not keep, and checkpoints beyond `step`.

    Returns:
        The deleted folders.

    Raises:
        OSError: one cannot be deleted.
        UnreadableError: which one is best cannot be told now; only those beyond `step` are deleted.
    """
    return drop_beyond(checkpoints, step) + drop_surplus(checkpoints, config)


def drop_beyond(checkpoints: Path, step: int) -> list[Path]:
    """Delete what a run has left that fell back behind damaged checkpoints; otherwise as `prune`."""
    gone = [path for number, path in step_folders(checkpoints) if number > step]
    for folder in gone:
        try:
            remove(folder)
        except OSError as error:
            reason = f"{folder} cannot be deleted, and a later start could go on from it ({error.strerror})"
            raise OSError(error.errno, reason, error.filename) from error
    return gone


def drop_surplus(checkpoints: Path, config: CheckpointConfig) -> list[Path]:
    """Delete all but the newest, the multiples of `keep_every` and the best; otherwise as `prune`.

    One that cannot be deleted does not save the others.
    """
    folders = step_folders(checkpoints)
    kept = {path for _, path in (folders[-config.keep_last :] if config.keep_last else folders)}
    kept |= {path for number, path in folders if config.keep_every and number % config.keep_every == 0}
    best = best_of([path for _, path in folders], config)
    gone = [path for _, path in folders if path not in kept and path != best]
    refusals = []
    for folder in gone:
        try:
            remove(folder)
        except OSError as error:
            refusals.append(error)
    if refusals:
        raise refusals[0]
    return gone


def best_of(folders: list[Path], config: CheckpointConfig) -> Path | None:
    """The folder with the best value of `keep_best`, the newest of equals; None where none has a value.

    Only values count that were measured on what the newest one was (`data.allow_changed`, another
    `validation.split`). Earlier versions did not note all of it; what one side does not know is not compared.

    Args:
        folders: oldest first. config: says what is best.

    Raises:
        UnreadableError: a manifest cannot be read now, so its checkpoint may be the best.
    """
    if config.keep_best is None:
        return None
    sign = 1.0 if config.best_mode == "max" else -1.0
    measured_on = ["data", VALIDATED] if config.keep_best.startswith(VALIDATION_PREFIX) else ["data"]
    scored = []
    known: dict[str, str] = {}
    for folder in reversed(folders):
        try:
            manifest = Manifest.read(folder)
        except UnreadableError:
            raise
        except CheckpointError:  # not whole: nothing to keep it for
            continue
        value = manifest.metrics.get(config.keep_best)
        if value is None:
            continue
        said = {name: manifest.identity[name] for name in measured_on if name in manifest.identity}
        if all(known.setdefault(name, of) == of for name, of in said.items()):
            scored.append((sign * value, folder.name, folder))
    return max(scored)[2] if scored else None


def remove(folder: Path) -> None:
    """Delete a checkpoint, its manifest first: a half-deleted one must not look whole."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder)
