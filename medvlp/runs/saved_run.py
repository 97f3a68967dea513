"""A run as evaluation and export read it: its folder, one verified checkpoint, config, tokenizer."""

import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

from medvlp import config_files, trust
from medvlp.config import Config
from medvlp.config_files import ConfigError
from medvlp.data.text import Tokenizer
from medvlp.data.transforms import evaluation_crop
from medvlp.methods.base import Method
from medvlp.methods.registry import build_method, schemas
from medvlp.runs.agreement import together
from medvlp.runs.checkpoint import Checkpoint
from medvlp.runs.encoder_records import described
from medvlp.runs.errors import RunFolderError
from medvlp.runs.identity import (
    IDENTITY,
    STORED_SIDE,
    WINDOW,
    DataRecord,
    IdentityError,
    RunIdentity,
    check_tokenizer,
    unchecked,
)
from medvlp.runs.manifest import EXPORTED_HEADS, MANIFEST, WEIGHTS, Manifest
from medvlp.runs.run_folder import CONFIG
from shards.errors import DataError
from shards.format import Index, is_remote

if TYPE_CHECKING:
    from shards.dicom_windows import Window

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SavedRun:
    """A run folder and one of its checkpoints, whose weights were whole when it was chosen."""

    run: Path
    checkpoint: Checkpoint

    @property
    def manifest(self) -> Manifest:
        """Of the checkpoint."""
        return self.checkpoint.manifest

    @property
    def step(self) -> int:
        """Finished optimiser steps of the checkpoint."""
        return self.manifest.step

    @property
    def weights(self) -> str:
        """Checksum of the weights: another training in the same folder has checkpoints of the same names."""
        return str(self.manifest.files[WEIGHTS]["xxh3_128"])

    @cached_property
    def stored(self) -> tuple[RunIdentity, Tokenizer] | None:
        """What the run was made from, with its tokenizer; None for versions that stored neither.

        Raises:
            IdentityError: what is stored is not of this checkpoint.
        """
        return RunIdentity.read(self.run, self.manifest.identity)

    def name(self, config: Config) -> str:
        """What people call the run: `run.name`, or else its folder's name."""
        return config.run.name or self.run.resolve().name


def run_of(path: Path) -> Path:
    """The run folder that a run or checkpoint folder belongs to, whatever it holds."""
    return path if (path / CONFIG).is_file() else path.resolve().parent.parent


def locate(path: Path) -> SavedRun:
    """Find the run and checkpoint that a path means, and verify its checksums; all ranks call this together.

    Args:
        path: a run folder (its newest valid checkpoint is taken) or a checkpoint folder
            (`RUN/checkpoints/step-00000005`).

    Raises:
        RunFolderError: neither of them (on some rank's machine), or a run without checkpoints.
        CheckpointError: the checkpoint is damaged, or all of the run's are, or a manifest is unreadable.
    """
    run = together(lambda: _run_at(path))
    if run == path:
        newest = Checkpoint.find(path)
        if newest is None:
            if (path / CONFIG).is_file() and (path / EXPORTED_HEADS).is_file():
                raise RunFolderError(
                    f"{path} is what `medvlp export` wrote, for medvlp.load, predict, timm and transformers: "
                    "name the run it was exported from"
                )
            raise RunFolderError(f"{path}: no checkpoint in its folder checkpoints/; train a step first")
        return SavedRun(path, newest)
    return SavedRun(run, together(lambda: Checkpoint.open(path, [WEIGHTS])))


def _run_at(path: Path) -> Path:
    """The run folder that a run or checkpoint folder belongs to; errors as `locate`."""
    if (path / CONFIG).is_file():
        return path
    if not (path / MANIFEST).is_file():
        raise RunFolderError(
            f"{path}: neither a run folder (with {CONFIG}) nor a checkpoint folder (with {MANIFEST})"
        )
    run = run_of(path)
    if not (run / CONFIG).is_file():
        raise RunFolderError(f"{path}: no {CONFIG} in {run}; a checkpoint is read inside its run folder")
    return run


#: Keys that only a training makes use of.
_OF_TRAINING = frozenset({"deepspeed", "monitor.entity", "monitor.share_samples"})


def load_config(
    source: SavedRun,
    overrides: Sequence[str],
    data: str | None = None,
    reads_data: bool = True,
    untrained: bool = False,
    tasks: config_files.Tasks = None,
    files: Sequence[Path] = (),
    trains: bool = False,
) -> Config:
    """The run's config with overrides; errors as `medvlp.config_files.load`.

    What the run folder names beyond itself is used on the user's word only (`medvlp.trust`); a
    `data.cache_dir` that is not the user's is left out.

    Args:
        source: run and checkpoint.
        overrides: `section.key=value`.
        data: dataset folder or URL prefix in place of the run's.
        reads_data: false for a caller that opens no dataset.
        untrained: the network before training is built too, from what training began with.
        tasks: config classes of evaluation tasks, for what evaluates.
        files: the user's YAML files, over the run's config and below the overrides.
        trains: a training is made of it, with the run's way to use a machine and to report.
    """
    given = [*overrides, *([] if data is None else [f"data.root={json.dumps(trust.escaped(data))}"])]
    if not reads_data and source.stored is not None and source.stored[0].origin:
        given.insert(0, "data.root=unknown")  # imported weights have no dataset, and nobody asks for it here
    unused = {"run.dir", "data.cache_dir"} | (set() if reads_data else {"data.root"})
    if not trains:
        unused |= _OF_TRAINING
    encoders = source.stored[0].encoders if source.stored is not None else {}
    if source.stored is not None:
        unused.add("data.tokenizer")
    if not untrained:
        unused |= {"image.pretrained"} | {f"{part}.name" for part in encoders}
    config = config_files.load(
        [config_files.RunFile(source.run / CONFIG, source.run), *files], given, schemas(), unused, tasks
    )
    cache = config.data.cache_dir
    if cache and not any(text.startswith("data.cache_dir=") for text in overrides):
        config.data.cache_dir = cache if trust.is_said("data.cache_dir", cache) else None
    return config


def load_tokenizer(source: SavedRun, config: Config) -> Tokenizer:
    """The tokenizer the run was trained with, which is stored with it.

    Runs of versions that stored none are told so in a warning, and get the one their config names.

    Raises:
        IdentityError: what is stored is not the checkpoint's, or `data.tokenizer` names another one.
        RunFolderError: none is stored, and the one named is not there.
    """
    found = source.stored
    if found is not None:
        identity, tokenizer = found
        check_tokenizer(tokenizer, identity, config.data.tokenizer, str(source.run))
        return tokenizer
    logger.warning("%s", unchecked(source.run))
    try:
        return Tokenizer.load(config.data.tokenizer, config.data.root)
    except ConfigError as error:
        raise RunFolderError(
            f"{source.run} holds no copy of its tokenizer, and it cannot be read where the config says "
            f"({error}): say where the training data are now with data.root=PLACE"
        ) from error


def check_place(source: SavedRun, config: Config, said: bool) -> None:
    """Look at whether the run's own dataset is still where its config names it.

    Args:
        source: run and checkpoint.
        config: of the run, with overrides.
        said: the user named the dataset for this.

    Raises:
        DataError: it is not.
    """
    root = config.data.root
    if not said and not is_remote(root) and not Path(root).is_dir():
        raise DataError(
            f"data folder {root} does not exist; if the dataset of {source.run} was moved, say --data FOLDER"
        )


def check_data(
    source: SavedRun, config: Config, index: Index, said: bool, say: Callable[[str], None]
) -> None:
    """Look at whether a dataset is the one the checkpoint was trained on.

    Args:
        source: run and checkpoint.
        config: of the run, with overrides.
        index: of the dataset that is read.
        said: the user named the dataset for this (`--data`): another one is meant, and said in a line.
        say: receives that line.

    Raises:
        IdentityError: it is another one without the user's word.
    """
    if source.stored is None:
        return
    identity, _ = source.stored
    then = identity.trained_on(source.manifest.identity)
    if then is None:
        say(f"{source.run} was imported: whether its weights have seen {config.data.root} is not known here")
        side = stored_side(source, config)
        if (
            evaluation_crop(config.data.transform) == "center"
            and STORED_SIDE in identity.origin
            and index.image_size != side
        ):
            say(
                f"its published evaluation sees the middle {config.data.image_size} of {side} pixels, and "
                f"{config.data.root} stores {index.image_size}: build it with --image-size {side} to compare"
            )
        return
    if title := identity.start_origin.get("title"):
        say(f"{source.run} began with {title}: whether that has seen {config.data.root} is not known here")
    changes = then.differences(DataRecord.of(index, config.data.split))
    if not changes:
        return
    told = f"{config.data.root} is not what {source.run} was trained on: {'; '.join(changes)}"
    if not (said or config.data.allow_changed):
        raise IdentityError(f"{told}. Where it is meant, say so with --data {config.data.root}")
    say(told)


def stored_side(source: SavedRun, config: Config) -> int:
    """Side in pixels of the square that an image is fitted into before the view of the network is cut.

    That of the dataset the weights have learned from, also where it is smaller than the view; of imported
    weights that of the published evaluation, or where it cuts no view that of the view.

    Raises:
        IdentityError: what is stored is no side.
    """
    if source.stored is None:
        return config.data.image_size
    identity = source.stored[0]
    record = identity.trained_on(source.manifest.identity)
    if record is None:
        key, remedy = STORED_SIDE, "import again"
        said = str(identity.origin.get(STORED_SIDE, config.data.image_size))
    else:
        key, remedy, said = "image_size", "bring back the one stored with it", str(record.image_size)
    if not re.fullmatch("[1-9][0-9]{0,3}", said):
        raise IdentityError(f"{source.run}: {key} of its {IDENTITY} is no side in pixels: {remedy}")
    return int(said) if record is not None else max(config.data.image_size, int(said))


def dicom_window(source: SavedRun) -> "Window | None":
    """How DICOM films get the grey levels that the checkpoint has learned from; None: the run does not say.

    Raises:
        IdentityError: it says what there is not.
    """
    from shards.dicom_windows import Window  # here: it imports pydicom, which few commands need

    if source.stored is None:
        return None
    identity, _ = source.stored
    record = identity.trained_on(source.manifest.identity)
    said: Any = identity.origin.get(WINDOW) if record is None else record.window
    if said is not None and said not in get_args(Window):
        raise IdentityError(
            f"{source.run}: its {IDENTITY} names no way to show DICOM films: bring back the stored one"
        )
    return cast("Window | None", said)


def load_method(source: SavedRun, config: Config, tokenizer: Tokenizer) -> Method:
    """The trained method on the CPU in evaluation mode, with the weights of the checkpoint.

    Weights and models that training started from need not be at hand any more.

    Raises:
        CheckpointError: the weights cannot be read or do not fit.
        RunFolderError: the run trains a downstream task.
    """
    if config.task is not None:
        raise RunFolderError(
            f"{source.run} is a fine-tuning of task {config.task}, no pre-training: its validations are in "
            f"metrics.jsonl; medvlp evaluate {config.finetune.run} --task {config.task} measures the task"
        )
    identity = None if source.stored is None else source.stored[0]
    method = build_method(described(config, identity), tokenizer.vocab_size)
    method.prepare(tokenizer)
    source.checkpoint.weights_into(method)
    return method.eval()
