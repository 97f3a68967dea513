"""A batch in memory that processes share is the batch."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Iterator

import pytest
import torch

from medvlp.data.batch import Batch, Text, join
from medvlp.data.packing import PackedBatch, Slots
from medvlp.training.predictions import _Collected
from shards.errors import DataError


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
    text, counts = Text(ids, ids + 1, ids + 2, ids + 3, (3,) * rows), {"some": tuple(range(rows))}
    return Batch(image, text, torch.arange(rows), labels, keys, 1, ["why"], fields, None, counts)


@pytest.fixture
def slots() -> Iterator[Slots]:
    """Two of one worker, with room for five rows."""
    slots = Slots(workers=1, ahead=1, size=1200)
    yield slots
    slots.close()


def sent(packed: PackedBatch) -> PackedBatch:
    """As the rank receives it."""
    received: PackedBatch = pickle.loads(pickle.dumps(packed))
    return received


def assert_same(found: Batch, given: Batch) -> None:
    expected, seen = dataclasses.asdict(given), dataclasses.asdict(found)
    for name in ("keys", "skipped", "faults", "study", "counts"):
        assert seen.pop(name) == expected.pop(name)
    torch.testing.assert_close(seen, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_a_packed_batch_unpacks_to_the_same(slots: Slots, rows: int) -> None:
    assert_same(sent(slots.pack(batch(rows), worker=0)).unpack(), batch(rows))


def test_counts_go_with_the_samples() -> None:
    whole = batch(5)
    whole.fields = {"some": whole.fields["some"]}
    parts = [whole.rows(0, 2), whole.rows(2, 5)]
    assert [of.counts for of in parts] == [{"some": (0, 1)}, {"some": (2, 3, 4)}]
    assert join(parts).counts == whole.to("cpu").counts == whole.counts


def test_what_is_kept_of_a_batch_keeps_no_images(slots: Slots) -> None:
    """Predictions kept all images of a split in memory, page-locked where there is CUDA."""
    found = _Collected()
    for number in range(2):
        given = sent(slots.pack(batch(5), worker=0)).unpack()
        found.add(number, given, None, {"labels": given.labels, "some": given.fields["some"]})
    kept = [value for values in found._arrays.values() for value in values]
    assert len(kept) == 2 * 3
    assert all(value.untyped_storage().nbytes() == value.nbytes for value in kept)
    gathered = found.gathered()
    assert gathered.sample.tolist() == sorted([*range(5)] * 2)


def test_no_tensor_travels(slots: Slots) -> None:
    message = len(pickle.dumps(slots.pack(batch(5), worker=0)))
    assert message < len(pickle.dumps(slots.pack(batch(0), worker=0))) + 100


def test_slots_are_filled_again_and_what_was_unpacked_stays(slots: Slots) -> None:
    found, waiting = [], slots.pack(batch(1), worker=0)
    for rows in (2, 3, 4, 5):  # one is always asked for in advance
        following = slots.pack(batch(rows), worker=0)
        found.append(sent(waiting).unpack())
        waiting = following
    for rows, unpacked in enumerate(found, 1):
        assert_same(unpacked, batch(rows))


def test_a_batch_that_was_replaced_before_it_was_read_is_no_other_batch(slots: Slots) -> None:
    lost = slots.pack(batch(1), worker=0)
    slots.pack(batch(2), worker=0)
    slots.pack(batch(3), worker=0)
    with pytest.raises(RuntimeError, match="worker 0 replaced batch 0 by 2 before it was read"):
        sent(lost).unpack()


def test_room_that_is_not_used_takes_no_memory() -> None:
    slots = Slots(workers=1, ahead=1, size=1 << 40)  # more than any machine that runs tests has
    assert_same(sent(slots.pack(batch(5), worker=0)).unpack(), batch(5))
    slots.close()
    with pytest.raises(DataError, match=r"131072\.0 GiB of addresses .*: Cannot allocate memory; lower data"):
        Slots(workers=1, ahead=0, size=1 << 47)


def test_a_batch_larger_than_a_slot_travels_by_itself(slots: Slots) -> None:
    first, large, second = (slots.pack(batch(rows), worker=0) for rows in (1, 50, 2))
    assert isinstance(large.memory, torch.Tensor)
    assert large.memory.is_shared()
    for packed, rows in ((first, 1), (large, 50), (second, 2)):
        assert_same(packed.unpack(), batch(rows))
