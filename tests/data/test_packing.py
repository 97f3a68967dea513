"""A batch in one block is the batch."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
import torch

from medvlp.data.batch import Batch, Text
from medvlp.data.packing import PackedBatch, pack


def batch(rows: int) -> Batch:
    generator = torch.Generator().manual_seed(rows)
    image = torch.randint(0, 256, (rows, 1, 7, 5), generator=generator, dtype=torch.uint8)
    ids = torch.randint(0, 99, (rows, 3), generator=generator)
    fields = {
        "some": torch.rand(rows, 2, generator=generator) > 0.5,
        "number": torch.tensor(2.5),
        "across": torch.rand(4, rows, generator=generator).T,
    }
    keys = [f"k{row}" for row in range(rows)]
    labels = torch.full((rows, 2), torch.nan)
    text = Text(ids, ids + 1, ids + 2, ids + 3, (3,) * rows)
    return Batch(image, text, torch.arange(rows), labels, keys, 1, ["why"], fields)


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_a_packed_batch_unpacks_to_the_same(rows: int) -> None:
    given = batch(rows)
    packed = pack(given)
    assert packed.block.is_shared()
    found = packed.unpack()
    expected, seen = dataclasses.asdict(given), dataclasses.asdict(found)
    for name in ("keys", "skipped", "faults", "study"):
        assert seen.pop(name) == expected.pop(name)
    torch.testing.assert_close(seen, expected, rtol=0, atol=0, equal_nan=True)
    assert found.image.untyped_storage().data_ptr() == packed.block.untyped_storage().data_ptr()


def test_one_tensor_travels() -> None:
    """What the shell holds are plain values: it pickles without a storage."""
    shell = pack(batch(3)).shell
    assert not [value for value in vars(shell).values() if isinstance(value, torch.Tensor)]
    again = PackedBatch(pickle.loads(pickle.dumps(shell)), pack(batch(3)).block).unpack()
    assert torch.equal(again.text.sentence_index, batch(3).text.sentence_index)
