"""`Batch.entities`: the matrices of the stored entities, their flip, and what happens without any."""

from __future__ import annotations

import itertools
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from medvlp.config import Config, TransformConfig
from medvlp.data.entities import EntityRows
from medvlp.data.loader import build_loader, evaluation_loader
from medvlp.data.text import Tokenizer
from medvlp.data.tokens import TokenStore
from medvlp.data.transforms import DRAWS, SampleRandom
from medvlp.methods import registry
from shards.entities.matrix import entity_matrix, mirrored
from shards.errors import DataError
from shards.reader import ShardReader

ConfigFactory = Callable[..., Config]


def test_packed_rows_give_back_every_matrix() -> None:
    samples = [
        [["left pleural space", "effusion", 1], ["heart", "cardiomegaly", 0], ["lung", "edema", -1]],
        [],
        [["unspecified", "normal", 1], ["other thing", "unknown word", 0]],
    ]
    rows = EntityRows.pack(samples)
    for selection in ([0, 1, 2], [2, 0, 0], [1], []):
        matrices = rows.matrices(np.array(selection, dtype=np.int64))
        assert matrices.shape == (len(selection), 51, 75)
        assert matrices.dtype == np.int8
        for matrix, i in zip(matrices, selection, strict=True):
            np.testing.assert_array_equal(matrix, entity_matrix(samples[i]))
    last = EntityRows.pack([[["other", "excluded_obs", 1]]]).matrices(np.array([0]))
    assert last[0, 50, 74] == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_hold_the_matrices_of_their_samples(
    dataset: Path, make_config: ConfigFactory, tokenizer: Tokenizer, workers: int
) -> None:
    config, reader = make_config(workers=workers), ShardReader(dataset)
    loader = build_loader(config, reader, tokenizer, 0, 1, 16, entities=True)
    for batch in itertools.islice(loader, 3):
        assert batch.entities is not None
        assert batch.entities.shape == (16, 51, 75)
        assert batch.entities.dtype == torch.int8
        for matrix, position in zip(batch.entities, batch.sample.tolist(), strict=True):
            expected = entity_matrix(reader.metadata("train", position)["entities"])
            np.testing.assert_array_equal(matrix.numpy(), expected)
        assert (batch.entities == 1).any()
        assert (batch.entities == 0).any()


def test_only_who_asks_gets_entities(make_config: ConfigFactory, tokenizer: Tokenizer) -> None:
    config = make_config()
    reader = ShardReader(config.data.root)
    assert next(iter(build_loader(config, reader, tokenizer, 0, 1, 16))).entities is None
    for entities in (False, True):
        batch = next(iter(evaluation_loader(config, reader, tokenizer, "test", 4, entities=entities)))
        assert (batch.entities is not None) == entities


@pytest.mark.parametrize("policy", ["swap", "keep"])
def test_a_flipped_sample_has_its_sides_exchanged(
    make_config: ConfigFactory, tokenizer: Tokenizer, policy: str
) -> None:
    config = make_config(transform=TransformConfig(flip=0.5, flip_entities=policy))  # type: ignore[arg-type]
    reader = ShardReader(config.data.root)
    batch = next(iter(build_loader(config, reader, tokenizer, 0, 1, 16, entities=True)))
    assert batch.entities is not None
    random, changed = SampleRandom(config.train.seed, 0), 0
    for matrix, position in zip(batch.entities, batch.sample.tolist(), strict=True):
        stored = entity_matrix(reader.metadata("train", position)["entities"])
        flipped = random.uniform(position, DRAWS)[3] < 0.5
        expected = mirrored(stored) if flipped and policy == "swap" else stored
        np.testing.assert_array_equal(matrix.numpy(), expected)
        changed += flipped and not np.array_equal(stored, mirrored(stored))
    assert changed > 2


def test_store_maps_entities_in_a_worker(
    dataset: Path, make_config: ConfigFactory, tokenizer: Tokenizer
) -> None:
    store = TokenStore.open_or_build(ShardReader(dataset), "train", make_config().data, tokenizer)
    copy = pickle.loads(pickle.dumps(store))
    rows = np.arange(len(store))
    np.testing.assert_array_equal(copy.entities.matrices(rows), store.entities.matrices(rows))


def test_dataset_without_entities_is_refused(
    own_dataset: Path, make_config: ConfigFactory, tokenizer: Tokenizer
) -> None:
    for tar in own_dataset.glob("*.tar"):
        data = tar.read_bytes()
        while (start := data.find(b'"entities":[[')) >= 0:
            end = data.index(b"]]", start) + 2
            empty = b'"entities":[]'
            data = data[:start] + empty + b" " * (end - start - len(empty)) + data[end:]
        tar.write_bytes(data)
    reader = ShardReader(own_dataset)
    assert json.dumps(reader.metadata("train", 0)["entities"]) == "[]"
    config = make_config(root=str(own_dataset))
    with pytest.raises(DataError, match="medvlp shards annotate"):
        build_loader(config, reader, tokenizer, 0, 1, 16, entities=True)
    build_loader(config, reader, tokenizer, 0, 1, 16)


def test_registry_says_who_reads_entities(monkeypatch: pytest.MonkeyPatch) -> None:
    known = registry.schemas()["mgca"]
    entry = registry.Entry(known, registry.REGISTRY["mgca"].build, entities=True)
    monkeypatch.setitem(registry.REGISTRY, "reader", entry)
    assert registry.reads_entities("reader")
    assert not registry.reads_entities("mgca")
    with pytest.raises(registry.UnknownMethodError, match="nothing"):
        registry.reads_entities("nothing")
