"""The embedding ring: order, bounds, rows that cannot be, writers that die or go on meanwhile."""

from __future__ import annotations

import mmap
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medvlp.prototypes.ring import BankRows, EmbeddingRing, RingError, label_bits

WIDTH = 8


def embeddings(samples: torch.Tensor) -> torch.Tensor:
    """[n, WIDTH] unit vectors that tell their sample."""
    angle = samples.double()[:, None] * torch.arange(1, WIDTH // 2 + 1) * 0.37
    return (torch.cat([angle.sin(), angle.cos()], 1) / (WIDTH / 2) ** 0.5).float()


def add(ring: EmbeddingRing, first: int, count: int, modality: str = "image", step: int = 0) -> None:
    samples = torch.arange(first, first + count)
    ring.add(embeddings(samples), samples, modality, step, samples % 7)


def check_whole(rows: BankRows) -> None:
    """Every row's columns belong together."""
    torch.testing.assert_close(rows.embeddings, embeddings(rows.sample), atol=2e-3, rtol=0)
    assert torch.equal(rows.labels, rows.sample % 7)


@settings(max_examples=25)
@given(capacity=st.integers(1, 12), counts=st.lists(st.integers(0, 30), max_size=8))
def test_the_last_rows_are_kept_oldest_first(capacity: int, counts: list[int]) -> None:
    ring = EmbeddingRing(capacity, WIDTH)
    total = 0
    for number, count in enumerate(counts):
        add(ring, total, count, step=number)
        total += count
    rows = ring.rows()
    assert rows.sample.tolist() == list(range(max(0, total - capacity), total))
    assert len(ring) == min(total, capacity)
    check_whole(rows)
    assert (rows.step.diff() >= 0).all()


def test_rows_keep_what_is_known_of_them() -> None:
    ring = EmbeddingRing(10, WIDTH)
    samples = torch.tensor([4, 5])
    ring.add(3.0 * embeddings(samples), samples, "text", 7)
    rows = ring.rows()
    assert rows.modality.tolist() == [1, 1]
    assert rows.step.tolist() == [7, 7]
    assert rows.labels.tolist() == [-1, -1]
    torch.testing.assert_close(rows.embeddings, embeddings(samples), atol=1e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_without_a_direction_are_dropped_and_counted(dtype: torch.dtype) -> None:
    ring = EmbeddingRing(10, WIDTH)
    samples = torch.arange(5)
    values = embeddings(samples).to(dtype)
    values[1, 3], values[2, 0], values[3] = float("nan"), float("-inf"), 0.0
    ring.add(values, samples, "image", 0)
    assert ring.rows().sample.tolist() == [0, 4]
    assert ring.dropped == 3


def test_label_bits() -> None:
    nan = float("nan")
    labels = torch.tensor([[1.0, 0.0, 1.0], [0.0, -1.0, nan], [nan, nan, nan]])
    assert label_bits(labels).tolist() == [5, 0, -1]
    many = torch.zeros(1, 70)
    many[0, [62, 63, 69]] = 1.0
    assert label_bits(many).tolist() == [2**62]


def test_a_reader_of_shared_memory_sees_what_the_writer_wrote() -> None:
    memory = mmap.mmap(-1, EmbeddingRing.size(6, WIDTH))
    writer = EmbeddingRing(6, WIDTH, memory)
    reader = EmbeddingRing.attach(memory)
    add(writer, 0, 4)
    cursor = writer.written
    add(writer, 4, 1)
    assert reader.rows().sample.tolist() == [0, 1, 2, 3, 4]
    assert reader.rows(cursor).sample.tolist() == [0, 1, 2, 3]
    add(writer, 5, 4)
    assert reader.rows(cursor).sample.tolist() == [3]  # the others are overwritten


def test_a_buffer_without_a_ring_is_refused() -> None:
    with pytest.raises(RingError, match="no embedding ring"):
        EmbeddingRing.attach(bytearray(4096))
    with pytest.raises(RingError, match="too short"):
        EmbeddingRing.attach(bytearray(16))
    memory = bytearray(EmbeddingRing.size(6, WIDTH))
    EmbeddingRing(6, WIDTH, memory)
    np.frombuffer(memory, np.int64)[2] = 10**9
    with pytest.raises(RingError, match="does not fit"):
        EmbeddingRing.attach(memory)


def test_a_writer_that_dies_between_rows_and_cursor_leaves_whole_rows_only() -> None:
    memory = bytearray(EmbeddingRing.size(6, WIDTH))
    writer = EmbeddingRing(6, WIDTH, memory)
    add(writer, 0, 6)

    class Dies(dict):
        def items(self):
            yield "embeddings", self["embeddings"]  # the other columns are never written
            raise KeyboardInterrupt

    samples = torch.arange(6, 8)
    values = {"embeddings": embeddings(samples).half().numpy(), "sample": samples.numpy()}
    with pytest.raises(KeyboardInterrupt):
        writer._write(Dies(values))
    rows = EmbeddingRing.attach(memory).rows()
    assert rows.sample.tolist() == [2, 3, 4, 5]
    check_whole(rows)


def test_torn_rows_are_dropped_and_counted() -> None:
    ring = EmbeddingRing(6, WIDTH)
    add(ring, 0, 6)
    ring.state_dict()["embeddings"][2, :4] = 0.0
    ring.state_dict()["embeddings"][4, 0] = float("nan")
    assert ring.rows().sample.tolist() == [0, 1, 3, 5]
    assert ring.torn == 2


def test_reading_while_the_writer_goes_on() -> None:
    memory = bytearray(EmbeddingRing.size(64, WIDTH))
    writer, reader = EmbeddingRing(64, WIDTH, memory), EmbeddingRing.attach(memory)
    done = threading.Event()

    def write() -> None:
        first = 0
        while not done.is_set():
            add(writer, first, 5)
            first += 5

    thread = threading.Thread(target=write)
    thread.start()
    try:
        seen = 0
        for _ in range(200):
            rows = reader.rows()
            check_whole(rows)
            assert (rows.sample.diff() == 1).all()
            seen += len(rows.sample)
    finally:
        done.set()
        thread.join()
    assert seen > 1000
    assert reader.torn == 0


def test_state_goes_into_a_checkpoint_and_back() -> None:
    ring, other = EmbeddingRing(5, WIDTH), EmbeddingRing(5, WIDTH)
    add(ring, 0, 8)
    other.load_state_dict({name: torch.as_tensor(value).clone() for name, value in ring.state_dict().items()})
    for each in (ring, other):
        add(each, 8, 2)
    assert torch.equal(other.rows().embeddings, ring.rows().embeddings)
    assert other.rows().sample.tolist() == [5, 6, 7, 8, 9]
    with pytest.raises(ValueError, match="bank_rows"):
        EmbeddingRing(6, WIDTH).load_state_dict(ring.state_dict())


def test_rows_of_several_rings_are_joined() -> None:
    rings = [EmbeddingRing(5, WIDTH) for _ in range(3)]
    add(rings[0], 0, 3)
    add(rings[2], 3, 1, "text")
    rows = BankRows.joined([ring.rows() for ring in rings])
    assert rows.sample.tolist() == [0, 1, 2, 3]
    assert rows.modality.tolist() == [0, 0, 0, 1]
