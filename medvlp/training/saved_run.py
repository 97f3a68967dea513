"""A run as evaluation and export read it: its folder, one verified checkpoint, config, tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from medvlp import config_files
from medvlp.config import Config
from medvlp.data.text import Tokenizer
from medvlp.methods.base import Method
from medvlp.methods.registry import build_method, schemas
from medvlp.training import checkpoint as checkpoints
from medvlp.training.errors import CheckpointError, RunFolderError
from medvlp.training.manifest import MANIFEST, Manifest
from medvlp.training.run_folder import CONFIG
from shards.format import TOKENIZER_NAME


@dataclass(frozen=True)
class SavedRun:
    """A run folder and one of its checkpoints, whose weights were whole when it was chosen."""

    run: Path
    checkpoint: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        """Finished optimiser steps of the checkpoint."""
        return self.manifest.step

    def name(self, config: Config) -> str:
        """What people call the run: `run.name`, or else its folder's name."""
        return config.run.name or self.run.resolve().name


def locate(path: Path) -> SavedRun:
    """Find the run and checkpoint that a path means, and verify its checksums.

    Args:
        path: a run folder (its newest valid checkpoint is taken) or a checkpoint folder
            (`RUN/checkpoints/step-00000005`).

    Raises:
        RunFolderError: neither of them, or a run without checkpoints.
        CheckpointError: the checkpoint is damaged, or all of the run's are, or a manifest is unreadable.
    """
    if (path / CONFIG).is_file():
        newest = checkpoints.newest_valid(path)
        if newest is None:
            raise RunFolderError(f"{path}: no checkpoint in its folder checkpoints/; train a step first")
        return SavedRun(path, newest, Manifest.read(newest))
    if not (path / MANIFEST).is_file():
        raise RunFolderError(
            f"{path}: neither a run folder (with {CONFIG}) nor a checkpoint folder (with {MANIFEST})"
        )
    run = path.resolve().parent.parent
    if not (run / CONFIG).is_file():
        raise RunFolderError(f"{path}: no {CONFIG} in {run}; a checkpoint is read inside its run folder")
    manifest = Manifest.read(path)
    if checkpoints.WEIGHTS not in manifest.files:
        raise CheckpointError(f"{path / MANIFEST} names no {checkpoints.WEIGHTS}; choose another checkpoint")
    if problem := manifest.problem(path, [checkpoints.WEIGHTS]):
        raise CheckpointError(problem)
    return SavedRun(run, path, manifest)


def load_config(source: SavedRun, overrides: Sequence[str]) -> Config:
    """The run's config with overrides; errors as `medvlp.config_files.load`."""
    return config_files.load([source.run / CONFIG], overrides, schemas())


def load_tokenizer(source: SavedRun, config: Config) -> Tokenizer:
    """The tokenizer the model was trained with: the run folder's copy, or else the one its config names."""
    if not (source.run / TOKENIZER_NAME).is_file():
        return Tokenizer.load(config.data.tokenizer, config.data.root)
    # A transformers tokenizer has a file beside it that names its special tokens.
    whole = (source.run / "tokenizer_config.json").is_file()
    return Tokenizer.load(source.run if whole else None, source.run)


def load_method(source: SavedRun, config: Config, tokenizer: Tokenizer) -> Method:
    """The trained method on the CPU in evaluation mode, with the weights of the checkpoint.

    Raises:
        CheckpointError: the weights cannot be read or do not fit.
    """
    # Every weight comes from the checkpoint, so those training started from need not be at hand any more.
    image = (config.image.pretrained, config.image.weights)
    config.image.pretrained, config.image.weights = False, None
    try:
        method = build_method(config, tokenizer.vocab_size)
    finally:
        config.image.pretrained, config.image.weights = image
    method.prepare(tokenizer)
    checkpoints.load_weights(source.checkpoint, method)
    return method.eval()
