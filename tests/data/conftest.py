"""A small phantom dataset, built by the real builder, and configs that read it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from medvlp.config import Config
from medvlp.data.text import Tokenizer
from shards.build import BuildOptions, build_shards
from shards.merge import merge
from shards.plan import Part
from shards.reader import ShardReader
from shards.sample import StoredImage
from shards.sources.phantom import PhantomSource
from tests.drawn_once import drawn_once


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of 90 phantom studies at 64 pixels in shards of at most 16; not to be changed by a test."""

    def draw(root: Path) -> None:
        root.mkdir()
        options = BuildOptions(image=StoredImage(size=64), records_per_shard=16, vocab_size=800)
        build_shards(PhantomSource(90, 64, 0), root, options, 1, Part(1, 1))
        merge(root)

    return drawn_once("small-shards", draw, tmp_path_factory.mktemp("phantom") / "shards")


@pytest.fixture
def own_dataset(dataset: Path, tmp_path: Path) -> Path:
    """A copy of the dataset that a test may damage."""
    return Path(shutil.copytree(dataset, tmp_path / "shards", ignore=shutil.ignore_patterns("tokens")))


@pytest.fixture
def make_config(dataset: Path, tmp_path: Path) -> Callable[..., Config]:
    """`make_config(root=..., workers=..., **other data keys)` -> config with a global batch of 16."""

    def make(**data: object) -> Config:
        config = Config()
        config.train.global_batch = 16
        defaults = {
            "root": str(dataset),
            "image_size": 56,
            "workers": 0,
            "cache_dir": str(tmp_path / "cache"),
        }
        for name, value in {**defaults, **data}.items():
            setattr(config.data, name, value)
        return config

    return make


@pytest.fixture(scope="session")
def reader(dataset: Path) -> ShardReader:
    """Reader of the dataset."""
    return ShardReader(dataset)


@pytest.fixture(scope="session")
def tokenizer(dataset: Path) -> Tokenizer:
    """Tokenizer of the dataset."""
    return Tokenizer.load(None, dataset)
