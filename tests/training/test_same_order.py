"""Ranks that could not read the same samples of their copies of a dataset."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from medvlp import distributed
from medvlp.data.cache import open_reader
from medvlp.data.sample_store import SampleStore
from medvlp.data.text import Tokenizer
from tests.distributed_pool import Pools
from tests.training.runs import Overrides, load_config, train_expecting_error

pytestmark = pytest.mark.dist


def train_on_own_copy(roots: list[str], overrides: list[str]) -> tuple[str, str, int]:
    return train_expecting_error([*overrides, f"data.root={roots[distributed.rank()]}"])


def damage_a_sample_without_training(root: Path, words: list[str]) -> None:
    """Overwrite the metadata of a sample that the rules exclude, which can then not be told."""
    config = load_config([*words, f"data.root={root}"])
    reader, tokenizer = open_reader(config.data), Tokenizer.load(None, str(root))
    store = SampleStore.open_or_build(reader, "train", config.data, tokenizer)
    position = int(np.flatnonzero(~store.trainable())[0])
    offset, size = reader._members("train", position)[2]["json"]
    with (root / reader.locate("train", position)[0].file).open("r+b") as file:
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
    damage_a_sample_without_training(roots[1], words)
    told = gloo_pool(2).run(train_on_own_copy, [*map(str, roots)], words)
    assert told[0] == told[1]
    name, text, code = told[0]
    assert (name, code) == ("AgreedError", 3)
    assert text.startswith("rank 1 would draw other samples of split train than rank 0 (1 and 0 of them")
