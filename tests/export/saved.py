"""Run folders as training leaves them, without the training: weights of a seed, manifest, config."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import safetensors.torch
import torch

from medvlp import config_files
from medvlp.config import Config
from medvlp.data.text import Tokenizer
from medvlp.methods.base import Method
from medvlp.methods.registry import build_method, schemas
from medvlp.runs.identity import DataRecord, RunIdentity
from medvlp.runs.manifest import Manifest
from medvlp.runs.state_files import checksum
from shards.format import Index

TINY = [
    "image.name=test_vit",
    "data.image_size=32",
    "data.max_tokens=12",
    "data.workers=0",
    "text.options={hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 32}",
    "method.embedding=8",
    "method.head_hidden=16",
    "method.prototypes=8",
    "precision=fp32",
]


def trained_method(config: Config, seed: int) -> Method:
    """A method in which every parameter and buffer is as no initialisation leaves it."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    method = build_method(config, Tokenizer.load(None, config.data.root).vocab_size)
    for value in method.state_dict().values():
        if value.is_floating_point():
            # Positive, because some of them are variances.
            value.copy_(0.1 * torch.rand(value.shape, generator=generator) + 0.5 * value.abs())
    return method.eval()


def save_run(data: Path, folder: Path, *overrides: str, steps: tuple[int, ...] = (3,)) -> Method:
    """Write a run folder; the weights of step n are those of seed n. Returns the last step's method."""
    config = config_files.load([], [*TINY, f"data.root={data}", f"run.dir={folder}", *overrides], schemas())
    for step in steps:
        method = trained_method(config, step)
        checkpoint = folder / "checkpoints" / f"step-{step:08d}"
        checkpoint.mkdir(parents=True)
        file = checkpoint / "weights.safetensors"
        safetensors.torch.save_file(
            {name: value.contiguous() for name, value in method.state_dict().items()}, file
        )
        files = {file.name: {"bytes": file.stat().st_size, "xxh3_128": checksum(file)}}
        manifest = Manifest(
            step=step, epoch=0, world_size=1, zero_stage=0, precision="bf16", global_batch=8,
            config_hash="0123", files=files, versions={"torch": "9.9"},
        )  # fmt: skip
        (checkpoint / "manifest.json").write_text(manifest.to_json())
    (folder / "config.yaml").write_text(config_files.to_yaml(config))
    return method


def stored_at(run: Path, data: Path, side: int) -> None:
    """Say that the run learned from this dataset stored at another size."""
    tokenizer = Tokenizer.load(None, str(data))
    record = replace(DataRecord.of(Index.load(str(data)), "train"), image_size=side)
    identity = RunIdentity(tokenizer.content, tokenizer.special, None, (record,))
    identity.write(run, tokenizer)
    (folder,) = (run / "checkpoints").iterdir()
    manifest = replace(Manifest.read(folder), identity=identity.summary())
    (folder / "manifest.json").write_text(manifest.to_json())
