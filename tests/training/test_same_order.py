"""Ranks that could not read the same samples of their copies of a dataset."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from medvlp import distributed
from medvlp.data.cache import open_reader
from medvlp.data.sample_store import SampleStore
from medvlp.data.text import Tokenizer
from medvlp.training.validation import Validation
from tests.distributed_pool import Pools
from tests.training.runs import Overrides, load_config, train, train_expecting_error

pytestmark = pytest.mark.dist


def train_on_own_copy(roots: list[str], overrides: list[str]) -> tuple[str, str, int]:
    return train_expecting_error([*overrides, f"data.root={roots[distributed.rank()]}"])


def validated_on_own_copy(roots: list[str], overrides: list[str]) -> list[int]:
    """Positions that this rank validates on."""
    made, positions = Validation.__init__, list[int]()

    def remember(self: Validation, *arguments: Any) -> None:
        made(self, *arguments)
        positions.extend(self.positions.tolist())

    with mock.patch.object(Validation, "__init__", remember):
        train([*overrides, f"data.root={roots[distributed.rank()]}"])
    return positions


def damage_an_excluded_sample(root: Path, words: list[str], split: str) -> None:
    """Overwrite the metadata of a sample that the rules exclude, which can then not be told."""
    config = load_config([*words, f"data.root={root}"])
    reader, tokenizer = open_reader(config.data), Tokenizer.load(None, str(root))
    store = SampleStore.open_or_build(reader, split, config.data, tokenizer)
    position = int(np.flatnonzero(~store.trainable())[0])
    offset, size = reader._members(split, position)[2]["json"]
    with (root / reader.locate(split, position)[0].file).open("r+b") as file:
        file.seek(offset)
        file.write(b"@" * size)
    shutil.rmtree(root / "tokens")


def test_ranks_that_would_draw_other_samples_are_refused(
    gloo_pool: Pools, phantom_data: Path, overrides: Overrides, tmp_path: Path
) -> None:
    words = overrides("data.min_tokens=25", "data.max_bad_fraction=0.1", "train.steps=1")
    roots = [tmp_path / "one", tmp_path / "two"]
    for root in roots:
        shutil.copytree(phantom_data, root)
    assert gloo_pool(2).run(train_on_own_copy, [*map(str, roots)], words) == [("", "", 0)] * 2
    shutil.rmtree(tmp_path / "run")
    damage_an_excluded_sample(roots[1], words, "train")
    told = gloo_pool(2).run(train_on_own_copy, [*map(str, roots)], words)
    assert told[0] == told[1]
    name, text, code = told[0]
    assert (name, code) == ("AgreedError", 3)
    assert text.startswith("rank 1 would draw other samples of split train than rank 0 (1 and 0 of them")


@pytest.mark.parametrize("split", ["train", "test"])
def test_what_one_rank_cannot_read_ends_all(
    gloo_pool: Pools, phantom_data: Path, overrides: Overrides, tmp_path: Path, split: str
) -> None:
    words = overrides(
        "data.min_tokens=25", "data.max_bad_fraction=0", "train.steps=1", "validation.every_steps=1",
        "validation.split=test",
    )  # fmt: skip
    roots = [tmp_path / "one", tmp_path / "two"]
    for root in roots:
        shutil.copytree(phantom_data, root)
    damage_an_excluded_sample(roots[1], words, split)
    told = gloo_pool(2).run(train_on_own_copy, [*map(str, roots)], words)
    assert told[0] == told[1]
    name, text, code = told[0]
    assert (name, code) == ("AgreedError", 3)
    assert f"samples of split '{split}' cannot be read" in text


def test_ranks_validate_on_the_same_samples(
    gloo_pool: Pools, phantom_data: Path, overrides: Overrides, tmp_path: Path
) -> None:
    words = overrides(
        "data.min_tokens=25", "data.max_bad_fraction=0.3", "train.steps=1", "validation.every_steps=1",
        "validation.split=test",
    )  # fmt: skip
    roots = [tmp_path / "one", tmp_path / "two"]
    for root in roots:
        shutil.copytree(phantom_data, root)
    damage_an_excluded_sample(roots[1], words, "test")
    first, second = gloo_pool(2).run(validated_on_own_copy, [*map(str, roots)], words)
    assert first == second
    assert first
