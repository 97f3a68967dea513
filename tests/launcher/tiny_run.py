"""Phantom shards and a run folder with two checkpoints of a tiny model, for tests of what reads runs."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from medvlp import config_files
from medvlp.config import CheckpointConfig, Config
from medvlp.data.text import Tokenizer
from medvlp.methods.registry import build_method, schemas
from medvlp.runs import checkpoint_files
from medvlp.runs.manifest import WEIGHTS, Manifest
from medvlp.runs.state_files import StateFile
from shards.build import BuildOptions, build_shards
from shards.merge import merge
from shards.plan import Part
from shards.sample import StoredImage
from shards.sources.base import Source
from shards.sources.phantom import PhantomSource
from tests.drawn_once import drawn_once

TINY = [
    "data.image_size=32",
    "data.max_tokens=48",
    "data.workers=0",
    "image.name=vit_tiny_patch16_224",
    "image.options={embed_dim: 16, depth: 1, num_heads: 2, patch_size: 8}",
    "text.options={hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32}",
    "method.embedding=8",
    "method.head_hidden=16",
    "method.prototypes=8",
    "train.global_batch=8",
    "evaluation.bootstrap=40",
    "precision=fp32",
]


def build(source: Source, out: Path, **options) -> Path:
    fractions = {"train": 0.5, "valid": 0.25, "test": 0.25}
    settings = BuildOptions(image=StoredImage(32), fractions=fractions, **options)
    build_shards(source, out, settings, 1, Part(0, 1))
    merge(out)
    return out


def make_shards(folder: Path) -> Path:
    def draw(out: Path) -> None:
        build(PhantomSource(studies=160, image_size=32, seed=3), out, vocab_size=300)

    return drawn_once("tiny", draw, folder)


def save(config: Config, step: int, seed: int) -> None:
    """A checkpoint as training writes it, of a model with the weights of another seed than the run's."""
    torch.manual_seed(seed)
    tokenizer = Tokenizer.load(None, config.data.root)
    method = build_method(config, tokenizer.vocab_size)
    method.prepare(tokenizer)
    folder = checkpoint_files.partial_folder(Path(config.run.dir) / "checkpoints", step)
    weights = {name: value.contiguous() for name, value in method.state_dict().items()}
    entries = checkpoint_files.write(folder, [StateFile(folder / WEIGHTS, weights)])
    manifest = Manifest(step, 0, 1, 0, "fp32", 8, config_hash="", files=entries)
    checkpoint_files.commit(folder, manifest, CheckpointConfig(keep_last=0))


def make_run(shards: Path, folder: Path, *overrides: str, without: frozenset[str] = frozenset()) -> Path:
    """`without` are keys of TINY that the method does not have."""
    own = {word.partition("=")[0] for word in overrides} | without
    tiny = [word for word in TINY if word.partition("=")[0] not in own]
    words = [f"data.root={shards}", f"run.dir={folder}", *tiny, *overrides]
    config = config_files.load([], words, schemas())
    for step in (4, 9):
        save(config, step, seed=step)
    (folder / "config.yaml").write_text(config_files.to_yaml(config))
    shutil.copy(shards / "tokenizer.json", folder / "tokenizer.json")
    return folder
