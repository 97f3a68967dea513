"""A run as evaluation needs it: config, tokenizer, weights, and the network before its first step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from medvlp import config_files
from medvlp.config import Config
from medvlp.data.text import Tokenizer
from medvlp.evaluation.results import EvaluationError
from medvlp.methods.base import Method
from medvlp.methods.registry import build_method, schemas
from medvlp.training import checkpoint as checkpoints
from medvlp.training.manifest import MANIFEST, Manifest
from medvlp.training.randomness import random_state, restore_random_state, seed_weights
from medvlp.training.run_folder import CONFIG


@dataclass(frozen=True)
class Source:
    """What is evaluated: a run folder and one of its checkpoints."""

    run: Path
    checkpoint: Path
    step: int


def locate(path: Path) -> Source:
    """Find the run and checkpoint that a path means.

    Args:
        path: a run folder (its newest valid checkpoint is taken) or a checkpoint folder
            (`RUN/checkpoints/step-00000005`).

    Raises:
        EvaluationError: neither of them, a run without checkpoints, or a damaged checkpoint.
        CheckpointError: a run whose checkpoints are all damaged, or an unreadable manifest.
    """
    if (path / CONFIG).is_file():
        newest = checkpoints.newest_valid(path)
        if newest is None:
            raise EvaluationError(f"{path}: no checkpoint in its folder checkpoints/; train a step first")
        return Source(path, newest, Manifest.read(newest).step)
    if not (path / MANIFEST).is_file():
        raise EvaluationError(
            f"{path}: neither a run folder (with {CONFIG}) nor a checkpoint folder (with {MANIFEST})"
        )
    run = path.resolve().parent.parent
    if not (run / CONFIG).is_file():
        raise EvaluationError(f"{path}: no {CONFIG} in {run}; a checkpoint is read inside its run folder")
    manifest = Manifest.read(path)
    if problem := manifest.problem(path, [checkpoints.WEIGHTS]):
        raise EvaluationError(problem)
    return Source(run, path, manifest.step)


def load_config(source: Source, overrides: Sequence[str]) -> Config:
    """The run's config with overrides; errors as `medvlp.config_files.load`."""
    return config_files.load([source.run / CONFIG], overrides, schemas())


def load_tokenizer(source: Source, config: Config) -> Tokenizer:
    """The tokenizer the model was trained with: the run folder's copy, or else the one its config names."""
    if not (source.run / "tokenizer.json").is_file():
        return Tokenizer.load(config.data.tokenizer, config.data.root)
    # A transformers tokenizer has a file beside it that names its special tokens.
    whole = (source.run / "tokenizer_config.json").is_file()
    return Tokenizer.load(source.run if whole else None, source.run)


def load_models(
    source: Source, config: Config, tokenizer: Tokenizer, device: torch.device
) -> dict[str, Method]:
    """The trained network and the same one as it was before the first step (same config, same seed).

    Parts that the config starts from published weights have them in the untrained network too.
    """
    models = {}
    before = random_state()
    for name in ("trained", "untrained"):
        seed_weights(config.train.seed)
        method = build_method(config, tokenizer.vocab_size)
        if name == "trained":
            checkpoints.load_weights(source.checkpoint, method)
        models[name] = method.to(device).eval()
    restore_random_state(before)
    return models
