"""What the processes of the gloo pool do in tests of whole runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, Protocol

from medvlp.config import Config

#: The values of `precision` and `optimizer.name`.
Precision = Literal["fp32", "bf16", "fp16"]
OptimizerName = Literal["adamw", "sgd"]

#: A run of a second; a second layer in each encoder takes a fifth more at ZeRO stage 3. The wide
#: initialisation keeps the untrained text encoder's [CLS] outputs apart: with BERT's 0.02 they differ by
#: 1/500 of their mean, and batch norm then magnifies float32's rounding as much.
TINY = [
    "data.image_size=32", "data.max_tokens=24", "data.workers=0",
    "image.name=test_vit.r160_in1k", "image.options={depth: 1}",
    "text.options={hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 64, "
    "initializer_range: 0.2}",
    "text.dropout=0", "method.name=mgca", "method.prototypes=8", "method.embedding=16",
    "method.head_hidden=32", "train.global_batch=16", "train.steps=4", "train.threads=1", "optimizer.lr=1e-4",
    "precision=fp32", "checkpoint.every_steps=0", "monitor.wandb=disabled", "monitor.progress=false",
]  # fmt: skip


class Overrides(Protocol):
    """The fixture `overrides`."""

    def __call__(self, *more: str, run: str = "run") -> list[str]: ...


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def load_config(overrides: list[str]) -> Config:
    """The config of `medvlp pretrain OVERRIDES`."""
    from medvlp import config_files
    from medvlp.methods.registry import schemas

    return config_files.load([], overrides, schemas())


def train(overrides: list[str], fresh: bool = False) -> int:
    """A whole run on this rank of the pool; the exit code."""
    from medvlp.training.pretrain import Pretraining
    from medvlp.training.run import train as run

    return run(Pretraining(load_config(overrides)), fresh=fresh)


def train_from_file(file: str, overrides: list[str]) -> int:
    """A whole run from a YAML file and overrides."""
    from medvlp import config_files
    from medvlp.methods.registry import schemas
    from medvlp.training.pretrain import Pretraining
    from medvlp.training.run import train as run

    return run(Pretraining(config_files.load([file], overrides, schemas())))


def train_expecting_error(overrides: list[str], fresh: bool = False) -> tuple[str, str, Any]:
    """Name, text and exit code of the error a run ends with on this rank."""
    from shards.errors import MedvlpError

    try:
        train(overrides, fresh)
    except MedvlpError as error:
        return type(error).__name__, str(error), error.exit_code
    return "", "", 0
