"""Run folders as training leaves them, without the training: weights of a seed."""

from __future__ import annotations

from pathlib import Path

import torch

from medvlp import config_files
from medvlp.config import CheckpointConfig
from medvlp.data.text import Tokenizer
from medvlp.methods.registry import build_method, schemas
from medvlp.runs import checkpoint_files
from medvlp.runs.manifest import WEIGHTS, Manifest
from medvlp.runs.state_files import StateFile
from tests.training.runs import TINY


def save_run(data: Path, run: Path, *overrides: str, step: int = 3, seed: int | None = None) -> None:
    """Write `config.yaml` and a checkpoint; a learned table of 8 prototypes is among the weights.

    Where no seed of the weights is given it is the step.
    """
    given = [*TINY, f"data.root={data}", f"run.dir={run}", "run.name=tiny", *overrides]
    config = config_files.load([], given, schemas())
    torch.manual_seed(step if seed is None else seed)
    method = build_method(config, Tokenizer.load(None, data).vocab_size)
    folder = checkpoint_files.partial_folder(run / "checkpoints", step)
    weights = {name: value.contiguous() for name, value in method.state_dict().items()}
    entries = checkpoint_files.write(folder, [StateFile(folder / WEIGHTS, weights)])
    manifest = Manifest(step, 0, 1, 0, "fp32", 8, config_hash="", files=entries)
    checkpoint_files.commit(folder, manifest, CheckpointConfig(keep_last=0))
    (run / "config.yaml").write_text(config_files.to_yaml(config))
